"""On a CUDA device: every kernel against its reference, exactly, then times against byte floors.

Run from the root: `python tests/gpu/check_kernels.py --out FILE.jsonl`, or with `--small` in place
of `--out` for a quick pass without times, as under `compute-sanitizer`. Ends with status 1 and the
first bad coordinates if anything differs. Needs torch, triton and about 12 GB of device memory.

Shape letters: T tokens, K top-k, C columns, E experts, R ranks, G groups, W row width, D features.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a checkout, nothing installed

from kernel_bench import BenchCase, run_cases, write_rows  # noqa: E402

from sglang_moelb.kernels.count_experts import (  # noqa: E402
    KeyRule,
    count_experts,
    count_layers,
)
from sglang_moelb.kernels.cut_tokens import cut_tokens  # noqa: E402
from sglang_moelb.kernels.plan_cuts import plan_cuts  # noqa: E402
from sglang_moelb.kernels.row_layout import (  # noqa: E402
    AMOUNT_ONE,
    C_CUTTABLE_AMOUNT,
    C_PROTECTED_AMOUNT,
    FLAG_PROTECTED,
    FLAG_VISION,
    NUM_COUNTS,
    counts_of,
    histogram_of,
)
from sglang_moelb.kernels.testing import Routing, assert_close, random_routing  # noqa: E402
from sglang_moelb.kernels.token_amounts import token_amounts  # noqa: E402
from sglang_moelb.kernels.widen_candidates import widen_candidates  # noqa: E402
from sglang_moelb.types import Metric, Preference  # noqa: E402

OPS = ("count_experts", "plan_cuts", "cut_tokens", "widen_candidates", "token_amounts")
INT32_LIMIT = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one check: `num_extra` candidate columns beside the `topk` routed ones.

    The last `num_idle` ranks have no tokens.
    """

    num_tokens: int
    topk: int
    num_experts: int
    num_ranks: int
    num_extra: int = 0
    num_idle: int = 0
    skew: float = 3.0
    weighted: bool = False
    equal_weights: bool = False
    id_dtype: torch.dtype = torch.int64


SHAPES = (
    Shape(num_tokens=16384, topk=8, num_experts=128, num_ranks=4),
    Shape(num_tokens=16384, topk=8, num_experts=128, num_ranks=4, num_extra=4),
    Shape(num_tokens=16384, topk=8, num_experts=128, num_ranks=4, num_extra=4, weighted=True),
    Shape(num_tokens=16384, topk=8, num_experts=128, num_ranks=4, equal_weights=True),
    Shape(num_tokens=16384, topk=8, num_experts=128, num_ranks=4, skew=40.0, weighted=True),
    Shape(num_tokens=1025, topk=8, num_experts=256, num_ranks=64, id_dtype=torch.int32),
    Shape(num_tokens=777, topk=6, num_experts=64, num_ranks=8, num_extra=7, id_dtype=torch.int32),
    Shape(num_tokens=333, topk=1, num_experts=4, num_ranks=2, skew=8.0),
    Shape(num_tokens=50, topk=2, num_experts=3, num_ranks=1, skew=0.0),
    Shape(num_tokens=1, topk=8, num_experts=128, num_ranks=4),
    Shape(num_tokens=0, topk=8, num_experts=128, num_ranks=4),
    Shape(num_tokens=100_003, topk=8, num_experts=128, num_ranks=4, num_extra=4, weighted=True),
)

SMALL_SHAPES = (
    Shape(
        num_tokens=333, topk=8, num_experts=128, num_ranks=4, num_extra=4, num_idle=1, weighted=True
    ),
    Shape(num_tokens=77, topk=6, num_experts=64, num_ranks=2, num_extra=7, id_dtype=torch.int32),
    Shape(num_tokens=50, topk=2, num_experts=3, num_ranks=1, skew=0.0),
    Shape(num_tokens=1, topk=8, num_experts=128, num_ranks=4),
    Shape(num_tokens=0, topk=8, num_experts=128, num_ranks=4),
)
# Tokens and width of `token_amounts`.
AMOUNTS = ((0, 64), (1, 64), (1000, 2048), (16384, 2048), (300, 7168))
SMALL_AMOUNTS = ((0, 64), (1, 64), (1030, 64), (3, 7168))


def check_same(name: str, op: Callable, cpu_args: tuple, options: dict) -> tuple:
    """Run the op on host and device, twice there; AssertionError unless all results are equal."""
    args = tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in cpu_args)
    expected, once, again = (op(*a, **options) for a in (cpu_args, args, args))
    for i, (ref, out, out_again) in enumerate(zip(expected, once, again, strict=True)):
        if ref is None:
            assert out is None
            continue
        assert_close(f"{name}, result {i}", ref, out, tolerance=0.0)
        assert_close(f"{name}, result {i}, second run", out, out_again, tolerance=0.0)
    return once


def make_inputs(shape: Shape, seed: int) -> Routing:
    """A routing of the shape on the host."""
    num_columns = shape.topk + shape.num_extra
    case = random_routing(
        shape.num_tokens,
        num_columns,
        shape.num_experts,
        seed,
        skew=shape.skew,
        weighted=shape.weighted,
    )
    weights_TC = torch.full_like(case.weights_TC, 0.25) if shape.equal_weights else case.weights_TC
    return Routing(
        ids_TC=case.ids_TC.to(shape.id_dtype),
        weights_TC=weights_TC,
        flags_T=case.flags_T,
        amounts_T=case.amounts_T,
    )


def check_counts(shape: Shape) -> None:
    """`count_experts` under every key rule and without one."""
    case = make_inputs(shape, seed=1)
    args = (case.ids_TC, case.weights_TC, case.flags_T, case.amounts_T)
    rules = [KeyRule(metric=m, preference=p, seed=11) for m in Metric for p in Preference]
    for rule in (None, *rules):
        options = {"num_experts": shape.num_experts, "topk": shape.topk, "key_rule": rule}
        check_same(f"count_experts {shape} {rule}", count_experts, args, options)
    layers = [case.ids_TC[:, : shape.topk].roll(shift, 0) for shift in range(3)]
    args = (torch.stack(layers), case.flags_T)
    expected_LW = count_layers(*args, num_experts=shape.num_experts)
    rows_LW = count_layers(*(arg.cuda() for arg in args), num_experts=shape.num_experts)
    assert_close(f"count_layers {shape}", expected_LW, rows_LW, tolerance=0.0)
    place_LW = torch.full_like(rows_LW, 9)
    count_layers(
        *(arg.cuda() for arg in args), num_experts=shape.num_experts, out_LW=place_LW
    )
    assert_close(f"count_layers in place {shape}", expected_LW, place_LW, tolerance=0.0)


def check_cuts(shape: Shape) -> None:
    """Count, plan and cut on every rank; kept amounts of all ranks against the room."""
    rule = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)
    options = {"num_experts": shape.num_experts, "topk": shape.topk}
    idle = replace(shape, num_tokens=0)
    num_busy = shape.num_ranks - shape.num_idle
    cases = [make_inputs(shape if r < num_busy else idle, r) for r in range(shape.num_ranks)]
    counted = [count_experts(*_inputs(case), **options, key_rule=rule) for case in cases]
    rows_RW = torch.stack([row_W for row_W, _ in counted])
    for num_groups in {shape.num_experts, shape.num_ranks, 1}:
        total = int(histogram_of(rows_RW, shape.num_experts).sum())
        for share in (0.0, 0.4, 0.9):
            capacity_G = torch.full((num_groups,), int(share * total / num_groups))
            kept_G = torch.zeros(num_groups, dtype=torch.int64)
            for rank, (case, (_, keys_TC)) in enumerate(zip(cases, counted, strict=True)):
                name = f"{shape} G={num_groups} share={share} rank={rank}"
                plan_options = {"my_rank": rank, "num_experts": shape.num_experts}
                plan = check_same(
                    f"plan_cuts {name}", plan_cuts, (rows_RW, capacity_G), plan_options
                )
                ids_TC, weights_TC, flags_T, amounts_T = _inputs(case)
                args = (ids_TC, weights_TC, keys_TC, flags_T, amounts_T, *(p.cpu() for p in plan))
                new_ids_TC, _, _ = check_same(f"cut_tokens {name}", cut_tokens, args, options)
                kept_G += kept_amounts(case, new_ids_TC.cpu(), shape.num_experts, num_groups)
            _check_room(f"{shape} G={num_groups} share={share}", rows_RW, capacity_G, kept_G, shape)


def _inputs(case: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return case.ids_TC, case.weights_TC, case.flags_T, case.amounts_T


def kept_amounts(case: Routing, ids_TC: Tensor, num_experts: int, num_groups: int) -> Tensor:
    """Amounts by group of the rows of tokens that are not protected."""
    amount_T = torch.ones(len(ids_TC), dtype=torch.int64)
    if case.amounts_T is not None:
        amount_T = case.amounts_T.long()
    counted_TC = (ids_TC >= 0) & ((case.flags_T & FLAG_PROTECTED) == 0)[:, None]
    groups = ids_TC[counted_TC].long() // (num_experts // num_groups)
    amounts = amount_T[:, None].expand(ids_TC.shape)[counted_TC]
    return torch.zeros(num_groups, dtype=torch.int64).scatter_add_(0, groups, amounts)


def _check_room(
    name: str, rows_RW: Tensor, capacity_G: Tensor, kept_G: Tensor, shape: Shape
) -> None:
    counts_E5 = counts_of(rows_RW, shape.num_experts).long().sum(0)
    counts_G5 = counts_E5.view(len(capacity_G), -1, NUM_COUNTS).sum(1)
    room_G = (capacity_G - counts_G5[:, C_PROTECTED_AMOUNT]).clamp(min=0)
    if shape.weighted:
        assert bool((kept_G <= room_G).all()), f"{name}: kept {kept_G}, room {room_G}"
    else:
        expected_G = torch.minimum(room_G, counts_G5[:, C_CUTTABLE_AMOUNT])
        assert_close(f"{name}: kept", expected_G, kept_G)


def check_widening(shape: Shape) -> None:
    """`widen_candidates` for the first and the last rank."""
    case = make_inputs(shape, seed=2)
    generator = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(shape.num_tokens, shape.num_experts, generator=generator)
    scores_TE = logits_TE.mul(4).round().div(4).softmax(dim=1)
    num_local = shape.num_experts // shape.num_ranks
    for first_local in {0, shape.num_experts - num_local}:
        for num_extra in (0, 1, 4, 9):
            options = {
                "first_local": first_local,
                "num_local": num_local,
                "num_extra": num_extra,
            }
            args = (case.ids_TC, case.weights_TC, scores_TE, case.flags_T)
            check_same(f"widen_candidates {shape} {options}", widen_candidates, args, options)


def check_amounts(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """`token_amounts` within one unit of the reference, and equal on two runs."""
    generator = torch.Generator().manual_seed(num_tokens)
    sharpness_T1 = torch.rand(num_tokens, 1, generator=generator) * 3
    hidden_TD = (torch.randn(num_tokens, width, generator=generator) * sharpness_T1).to(dtype)
    flags_T = random_routing(num_tokens, 1, 4, seed=1).flags_T
    valid_T = torch.rand(num_tokens, generator=generator) < 0.9
    args = (hidden_TD, flags_T, valid_T)
    device_args = tuple(arg.cuda() for arg in args)
    for delta in (0.5, 1.0, 4.0):
        ref_T = token_amounts(*args, delta=delta)
        out_T = token_amounts(*device_args, delta=delta)
        again_T = token_amounts(*device_args, delta=delta)
        name = f"token_amounts T={num_tokens} D={width} {dtype} delta={delta}"
        assert_close(f"{name}, second run", out_T, again_T)
        worst = int((out_T.cpu() - ref_T).abs().max()) if num_tokens else 0
        share = float((out_T.cpu() != ref_T).float().mean()) if num_tokens else 0.0
        assert worst <= 1, f"{name}: differs by {worst} units"
        print(f"  {name}: worst {worst}, {share:.2%} of tokens differ")


def check_large_strides() -> None:
    """Rows so far apart that row times stride passes 2**31 elements."""
    num_tokens, stride = 16384, (INT32_LIMIT // 16384) + 64
    shape = Shape(num_tokens=num_tokens, topk=8, num_experts=128, num_ranks=4)
    case = make_inputs(replace(shape, id_dtype=torch.int32), seed=4)
    words = torch.empty(num_tokens * stride, dtype=torch.int32, device="cuda")
    wide = words.view(num_tokens, stride)
    ids_TC, weights_TC = wide[:, :8], wide.view(torch.float32)[:, 8:16]
    ids_TC.copy_(case.ids_TC)
    weights_TC.copy_(case.weights_TC)
    assert (num_tokens - 1) * stride > INT32_LIMIT
    rule = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)
    options = {"num_experts": 128, "topk": 8}
    flags_T = case.flags_T.cuda()
    row_W, keys_TC = count_experts(ids_TC, weights_TC, flags_T, None, **options, key_rule=rule)
    ref_row_W, ref_keys_TC = count_experts(*_inputs(case), **options, key_rule=rule)
    assert_close("strided count_experts, row", ref_row_W, row_W)
    assert_close("strided count_experts, keys", ref_keys_TC, keys_TC)
    plan = plan_cuts(row_W[None], torch.full((4,), 9000).cuda(), my_rank=0, num_experts=128)
    out = cut_tokens(ids_TC, weights_TC, keys_TC, flags_T, None, *plan, **options)
    ref_plan = tuple(part.cpu() for part in plan)
    ref_args = (case.ids_TC, case.weights_TC, ref_keys_TC, case.flags_T, None, *ref_plan)
    for name, ref, got in zip("iws", cut_tokens(*ref_args, **options), out, strict=True):
        assert_close(f"strided cut_tokens, {name}", ref, got, tolerance=0.0)
    _check_strided_scores(case, wide)
    _check_strided_hidden(wide)


def _check_strided_scores(case: Routing, wide: Tensor) -> None:
    scores_TE = torch.rand(len(wide), 128, generator=torch.Generator().manual_seed(5))
    far_TE = wide.view(torch.float32)[:, 64:192]
    far_TE.copy_(scores_TE)
    options = {"first_local": 96, "num_local": 32, "num_extra": 4}
    ref = widen_candidates(case.ids_TC, case.weights_TC, scores_TE, case.flags_T, **options)
    device = (part.cuda() for part in (case.ids_TC, case.weights_TC))
    out = widen_candidates(*device, far_TE, case.flags_T.cuda(), **options)
    assert_close("strided widen_candidates, ids", ref[0], out[0])
    assert_close("strided widen_candidates, weights", ref[1], out[1], tolerance=0.0)


def _check_strided_hidden(wide: Tensor) -> None:
    hidden_TD = torch.randn(len(wide), 64, generator=torch.Generator().manual_seed(6))
    hidden_TD *= torch.linspace(0.1, 4, len(wide))[:, None]
    far_TD = wide.view(torch.float32)[:, 64:128]
    far_TD.copy_(hidden_TD)
    flags_T = torch.full((len(wide),), FLAG_VISION, dtype=torch.uint8)
    valid_T = torch.ones(len(wide), dtype=torch.bool)
    ref_T = token_amounts(hidden_TD, flags_T, valid_T, delta=1.0)
    out_T = token_amounts(far_TD, flags_T.cuda(), valid_T.cuda(), delta=1.0)
    assert int((out_T.cpu() - ref_T).abs().max()) <= 1, "strided token_amounts"
    assert int(out_T.min()) < AMOUNT_ONE // 2 < int(out_T.max())


def all_bench_cases() -> Iterator[BenchCase]:
    """The cases of every benchmarks/bench_<op>.py."""
    for op in OPS:
        yield from importlib.import_module(f"bench_{op}").make_cases("cuda")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description="Check and time the kernels on a CUDA device.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="JSON lines file of the times")
    what.add_argument("--small", action="store_true", help="few small checks, no times")
    parser.add_argument("--num-calls", type=int, default=100, help="timed calls a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("check_kernels.py needs a CUDA device, and torch sees none")
    for shape in SMALL_SHAPES if args.small else SHAPES:
        check_counts(shape)
        check_cuts(shape)
        check_widening(shape)
        print(f"equal to the reference: {shape}", flush=True)
    for num_tokens, width in SMALL_AMOUNTS if args.small else AMOUNTS:
        for dtype in (torch.float32, torch.bfloat16):
            check_amounts(num_tokens, width, dtype)
    if args.small:
        return
    check_large_strides()
    print("equal to the reference: rows beyond 2**31 elements", flush=True)
    torch.cuda.empty_cache()
    write_rows(run_cases(all_bench_cases(), args.num_calls), args.out)


if __name__ == "__main__":
    main()
