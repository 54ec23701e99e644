"""On a CUDA device: the fp8 kernels and the downgrade plan against their references, bit for bit.

Run from the root: `python tests/gpu/check_fp8.py`. Ends with status 1 and the first difference if
anything differs. Needs torch and triton, and about 30 GB of device memory unless `--small` leaves
out what takes long (for compute-sanitizer). With DeepGEMM, its own quantisers are compared too,
and both grouped GEMMs are run on what the kernels make.

Shape letters: N output features, K input features, E experts, R ranks, W row width.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, nothing installed

import fp8_rows  # noqa: E402
from fp8_inputs import (  # noqa: E402
    UNTOUCHED,
    assert_same_fp8,
    make_slots,
    make_weights,
    no_host_sync,
)

from sglang_moelb.kernels import row_layout as layout  # noqa: E402
from sglang_moelb.kernels.convert_fp8 import convert_fp8, ref  # noqa: E402
from sglang_moelb.kernels.plan_downgrade import plan_downgrade  # noqa: E402
from sglang_moelb.kernels.testing import assert_close  # noqa: E402
from sglang_moelb.types import Form  # noqa: E402

QWEN_SHAPES = ((1536, 2048), (2048, 768))


def check_plans(num_cases: int) -> None:
    """`plan_downgrade` on device and host."""
    generator = torch.Generator().manual_seed(1)
    num_low = 0
    for case in range(num_cases):
        num_ranks, num_experts = ((4, 128), (64, 256), (8, 160), (1, 16))[case % 4]
        shape = (num_ranks, num_experts)
        width = layout.row_width(num_experts, with_histogram=case % 2 == 0)
        counts_RW = torch.randint(1 << 20, (num_ranks, width), generator=generator)
        counts_RE5 = layout.counts_of(counts_RW, num_experts)
        for column, largest in (
            (layout.C_TEXT_ROWS, (2, 30, 300)[case % 3]),
            (layout.C_VISION_ROWS, (3, 200, 1 << 27)[case % 3]),
        ):
            counts_RE5[..., column] = torch.randint(largest, shape, generator=generator)
        is_refused_RE = torch.randint(4 * num_experts, shape, generator=generator) == 0
        counts_RE5[..., layout.C_REFUSED_ROWS] = is_refused_RE.long()
        if case % 5 == 0:
            counts_RE5[:, num_experts // num_ranks :] = 0  # all rows on the first rank
        counts_RW = counts_RW.int()
        for form in Form:
            options = {
                "num_experts": num_experts,
                "capacity_factor": (1.0, 0.9, 1.05)[case % 3],
                "vision_share": (0.7, 0.5, 0.0)[case % 3],
                "form": form,
                "low_cost": (0.66, 0.0, 1.0, 0.9)[case % 4],
            }
            device_counts_RW = counts_RW.cuda()
            with no_host_sync():
                low_E = plan_downgrade(device_counts_RW, **options)
            assert_close(f"plan {shape} {options}", plan_downgrade(counts_RW, **options), low_E)
            num_low += int(low_E.sum())
    assert num_low > 0
    print(f"plan_downgrade: {num_cases} cases, {num_low} experts lowered, equal")


def check_conversion(
    num_experts: int, shapes: tuple[tuple[int, int], ...], wanted: str, num_programs: int | None
) -> None:
    """`convert_fp8` against its reference, with the slots that it must not touch."""
    weights = make_weights(num_experts, shapes, special=True)
    wanted_E = torch.zeros(num_experts, dtype=torch.int32, device="cuda")
    wanted_E[{"all": slice(None), "odd": slice(1, None, 2), "none": slice(0)}[wanted]] = 1
    out, scales = make_slots(weights)
    expected_out, expected_scales = make_slots(weights)
    with no_host_sync():
        convert_fp8(weights, out, scales, wanted_E=wanted_E, num_programs=num_programs)
    ref.convert_fp8(weights, expected_out, expected_scales, wanted_E=wanted_E)
    for i in range(len(weights)):
        name = f"convert E={num_experts} {shapes[i]} wanted={wanted} P={num_programs}"
        assert_same_fp8(name, expected_out[i], out[i])
        assert_close(f"{name}, scales", expected_scales[i], scales[i], tolerance=0.0)


def check_conversions(*, small: bool) -> None:
    """Shapes with and without edges; few programs and many; more than 2**31 elements."""
    for num_experts, shapes in (
        (3, ((256, 128), (128, 384))),
        (5, ((200, 136), (129, 1), (1, 640))),
        (1, ((128, 128),)),
        (7, ((130, 257), (64, 64), (128, 128), (384, 130))),
    ):
        for wanted in ("all", "odd", "none"):
            for num_programs in (None, 1, 20, 5000):
                check_conversion(num_experts, shapes, wanted, num_programs)
    if small:
        print("convert_fp8: small shapes equal")
        return
    for num_experts in (16, 32):
        for wanted in ("all", "odd", "none"):
            check_conversion(num_experts, QWEN_SHAPES, wanted, 44)
            check_conversion(num_experts, QWEN_SHAPES, wanted, None)
    num_experts, shape = 700, QWEN_SHAPES[0]
    weight_ENK = torch.empty(num_experts, *shape, dtype=torch.bfloat16, device="cuda")
    assert weight_ENK.numel() > 1 << 31
    wanted_E = torch.zeros(num_experts, dtype=torch.int32, device="cuda")
    (out_ENK,), (scale_ENK,) = make_slots([weight_ENK])
    for e in (0, 681, 682, 683, 699):
        weight_ENK[e].normal_(std=e + 1)
        wanted_E[e] = 1
    convert_fp8([weight_ENK], [out_ENK], [scale_ENK], wanted_E=wanted_E)
    for e in range(690):
        if not wanted_E[e]:
            assert bool((scale_ENK[e].view(torch.uint8) == UNTOUCHED).all()), f"expert {e} touched"
    for e in wanted_E.nonzero()[:, 0].tolist():
        one = [t[e : e + 1] for t in (weight_ENK, out_ENK, scale_ENK)]
        (expected_ENK,), (expected_scale_ENK,) = make_slots(one[:1])
        ref.convert_fp8(one[:1], [expected_ENK], [expected_scale_ENK], wanted_E=wanted_E[e : e + 1])
        assert_same_fp8(f"expert {e} of {num_experts}", expected_ENK, one[1])
        assert_close(f"scales of expert {e}", expected_scale_ENK, one[2], tolerance=0.0)
    print("convert_fp8: all shapes equal, more than 2**31 elements too")


def check_graph() -> None:
    """Plan and conversion in a CUDA graph follow the counts that each replay finds."""
    num_ranks, num_experts, my_rank = 4, 32, 2
    mine = slice(my_rank * 8, my_rank * 8 + 8)
    weights = make_weights(8, ((256, 384), (384, 128)), special=True)
    out, scales = make_slots(weights)
    counts_RW = torch.zeros(
        num_ranks, layout.row_width(num_experts, with_histogram=False), dtype=torch.int32
    ).cuda()
    options = {"capacity_factor": 1.0, "vision_share": 0.7, "form": Form.EXPERTS}

    def step() -> Tensor:
        low_E = plan_downgrade(counts_RW, num_experts=num_experts, **options)
        convert_fp8(weights, out, scales, wanted_E=low_E[mine], num_programs=20)
        return low_E

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low_E = step()
    for hot in ([], [17, 20], [3], [16, 17, 18, 19, 20, 21, 22]):
        counts_RW.zero_()
        layout.counts_of(counts_RW, num_experts)[0, :, layout.C_VISION_ROWS] = 10
        layout.counts_of(counts_RW, num_experts)[1, hot, layout.C_VISION_ROWS] = 500
        for slot in (*out, *scales):
            slot.view(torch.uint8).fill_(UNTOUCHED)
        graph.replay()
        expected_E = plan_downgrade(counts_RW.cpu(), num_experts=num_experts, **options)
        assert_close(f"plan in a graph, {hot}", expected_E, low_E)
        assert low_E.nonzero()[:, 0].tolist() == hot
        expected_out, expected_scales = make_slots(weights)
        ref.convert_fp8(weights, expected_out, expected_scales, wanted_E=low_E[mine])
        for i in range(len(weights)):
            assert_same_fp8(f"conversion in a graph, {hot}", expected_out[i], out[i])
            assert_close("its scales", expected_scales[i], scales[i], tolerance=0.0)
    print("plan and conversion in a CUDA graph: equal")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description="Check the fp8 kernels on a CUDA device.")
    parser.add_argument("--small", action="store_true", help="little work, for compute-sanitizer")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("check_fp8.py needs a CUDA device, and torch sees none")
    torch.manual_seed(0)
    check_plans(5 if args.small else 60)
    check_conversions(small=args.small)
    fp8_rows.check(small=args.small)
    if args.small:
        return
    check_graph()
    torch.cuda.empty_cache()
    if importlib.util.find_spec("deep_gemm") is None:
        print("no DeepGEMM here: its quantisers and grouped GEMMs are not checked")
        return
    importlib.import_module("fp8_gemms").check()


if __name__ == "__main__":
    main()
