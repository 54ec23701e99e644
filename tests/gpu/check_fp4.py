"""On a CUDA device: the FP4 kernels against their definitions, then times. About a minute.

Run from the root: `python tests/gpu/check_fp4.py --out FILE.jsonl`, or with `--small` in place of
`--out` for a quick pass without times, as under `compute-sanitizer`. Ends with status 1 and the
first bad coordinates if anything differs. Needs torch, triton and about 12 GB of device memory.

Shape letters: T rows, E experts, N output features, K features.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a checkout, nothing installed

from kernel_bench import BenchCase, BenchRow, run_cases, write_rows  # noqa: E402

from sglang_moelb.kernels import block_format as formats  # noqa: E402
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled  # noqa: E402
from sglang_moelb.kernels.convert_fp4 import convert_fp4  # noqa: E402
from sglang_moelb.kernels.grouped_fp4 import grouped_fp4  # noqa: E402
from sglang_moelb.kernels.grouped_fp4.ref import ROW_FORMATS  # noqa: E402
from sglang_moelb.kernels.low_precision import can_dot_scaled, multiplies_fp4  # noqa: E402
from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4  # noqa: E402
from sglang_moelb.kernels.scale_layout import (  # noqa: E402
    ScaleLayout,
    stored_bytes,
    to_layout,
)
from sglang_moelb.kernels.testing import assert_close  # noqa: E402

OPS = ("convert_fp4", "quantise_rows_fp4", "grouped_fp4")
FP4 = (BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL, BlockFormat.NVFP4)
INT32_LIMIT = 1 << 31
UNTOUCHED = 0xA5
# Of the result: half a bfloat16 step is at most 2**-8. Of the sum of magnitudes: what tensor cores
# lose when they align the products that they add at once.
RELATIVE, OF_MAGNITUDES = 2**-8, 1e-5


def random_values(shape: tuple[int, ...], seed: int) -> Tensor:
    """bfloat16 of very different magnitude along the first axes; some rows any bit patterns."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(*shape[:-1], 1, generator=generator) * 6
    values = (torch.randn(shape, generator=generator) * spread.exp2()).bfloat16()
    rows = values.view(-1, shape[-1])
    bits = torch.randint(-(1 << 15), 1 << 15, rows[::17].shape, generator=generator)
    rows[::17] = bits.short().view(torch.bfloat16)
    rows[1::19] = -0.0
    return values


def every_bfloat16() -> Tensor:
    """(1, 2 * 65536, 32): each value as the largest of its block, and beside a 6."""
    values = torch.arange(1 << 16).int().short().view(torch.bfloat16)
    blocks = torch.zeros(2, len(values), 32, dtype=torch.bfloat16)
    blocks[:, :, 9] = values
    blocks[1, :, 0] = 6
    return blocks.view(1, -1, 32)


def slot_for(weights: Tensor, block_format: BlockFormat, globals_: Tensor | None) -> BlockScaled:
    """A slot on the device whose bytes show what was written."""
    slot = formats.empty_block_scaled(tuple(weights.shape), block_format, "cuda")
    slot.codes.fill_(UNTOUCHED)
    slot.scales.fill_(UNTOUCHED)
    globals_ = None if globals_ is None else globals_.cuda()
    return BlockScaled(format=block_format, codes=slot.codes, scales=slot.scales, globals=globals_)


def quantised(
    x: Tensor, block_format: BlockFormat, globals_: Tensor | None = None
) -> tuple[BlockScaled, Tensor | None]:
    """The definition's result on the host, and the global scales."""
    if block_format.has_global and globals_ is None:
        globals_ = formats.global_scales(x)
    codes, scales = formats.quantise_blocks(x, globals_, block_format)
    return BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_), globals_


def check_convert(shapes: tuple[tuple[int, int, int], ...], *, in_graph: bool) -> None:
    """Bytes of wanted experts equal the definition's, those of others stay.

    In a graph the same launch reads a new `wanted_E` at each replay.
    """
    for block_format in FP4:
        tensors = tuple(random_values(shape, seed) for seed, shape in enumerate(shapes))
        expected = [quantised(tensor, block_format) for tensor in tensors]
        slots = tuple(
            slot_for(tensor, block_format, globals_)
            for tensor, (_, globals_) in zip(tensors, expected, strict=True)
        )
        on_device = tuple(tensor.cuda() for tensor in tensors)
        wanted_E = torch.zeros(shapes[0][0], dtype=torch.int32, device="cuda")
        call = partial(convert_fp4, on_device, wanted_E, slots, num_programs=100)
        call()  # compiles before the capture
        again = call
        if in_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            again = graph.replay
        for step in range(shapes[0][0] + 1):
            if step:
                wanted_E.fill_(0)[-step] = step
                again()
            for slot, (ref, _) in zip(slots, expected, strict=True):
                name = f"convert_fp4 {block_format.value} {shapes}, step {step}"
                _compare_experts(name, slot, ref, first=shapes[0][0] - step)


def check_layouts(shapes: tuple[tuple[int, int, int], ...]) -> None:
    """Scales in the layouts of other libraries, padding included."""
    tensors = tuple(random_values(shape, seed) for seed, shape in enumerate(shapes))
    wanted_E = torch.ones(shapes[0][0], dtype=torch.int32, device="cuda")
    for block_format in FP4:
        for layout in ScaleLayout:
            expected = [quantised(tensor, block_format) for tensor in tensors]
            slots = []
            for tensor, (_, globals_) in zip(tensors, expected, strict=True):
                slot = formats.empty_block_scaled(tuple(tensor.shape), block_format, "cuda", layout)
                if globals_ is not None and slot.globals is not None:
                    slot.globals.copy_(globals_)
                slots.append(slot)
            convert_fp4(tuple(tensor.cuda() for tensor in tensors), wanted_E, tuple(slots))
            for slot, (ref, _) in zip(slots, expected, strict=True):
                name = f"convert_fp4 {block_format.value} in {layout.value}"
                stored = stored_bytes(to_layout(ref.scales, layout), layout)
                assert_close(name, stored, stored_bytes(slot.scales, layout))


def _compare_experts(name: str, slot: BlockScaled, ref: BlockScaled, first: int) -> None:
    codes, scales = ref.codes.clone(), ref.scales.clone()
    codes[:first], scales[:first] = UNTOUCHED, UNTOUCHED
    assert_close(f"{name}, codes", codes, slot.codes)
    assert_close(f"{name}, scales", scales, slot.scales)


def check_convert_beyond_int32() -> None:
    """The first and the last expert of more than 2**31 elements."""
    num_outputs, width = 1536, 2048
    num_experts = INT32_LIMIT // (num_outputs * width) + 2
    weights = torch.empty(num_experts, num_outputs, width, dtype=torch.bfloat16, device="cuda")
    ends = random_values((2, num_outputs, width), seed=9)
    weights[0], weights[-1] = ends.cuda()
    wanted_E = torch.zeros(num_experts, dtype=torch.int32, device="cuda")
    wanted_E[[0, -1]] = 1
    for block_format in FP4:
        ref, globals_ = quantised(ends, block_format)
        slot = slot_for(weights, block_format, None)
        all_globals = None
        if globals_ is not None:
            all_globals = torch.ones(num_experts, device="cuda")
            all_globals[[0, -1]] = globals_.cuda()
        slot = BlockScaled(
            format=block_format, codes=slot.codes, scales=slot.scales, globals=all_globals
        )
        convert_fp4((weights,), wanted_E, (slot,))
        name = f"convert_fp4 beyond 2**31, {block_format.value}"
        assert_close(f"{name}, codes", ref.codes, slot.codes[[0, -1]])
        assert_close(f"{name}, scales", ref.scales, slot.scales[[0, -1]])
        assert int((slot.codes[1:-1] != UNTOUCHED).sum()) == 0, name


def check_rows(x_TK: Tensor, on_device: Tensor, name: str) -> None:
    """`quantise_rows_fp4` of `on_device`, which equals `x_TK`, in every format."""
    for block_format in BlockFormat:
        ref, globals_ = quantised(x_TK, block_format)
        got = quantise_rows_fp4(on_device, block_format=block_format)
        title = f"quantise_rows_fp4 {block_format.value} {name}"
        assert_close(f"{title}, codes", ref.codes, got.codes)
        assert_close(f"{title}, scales", ref.scales, got.scales)
        if globals_ is not None:
            assert got.globals is not None
            assert_close(f"{title}, globals", globals_, got.globals, tolerance=0.0)


def check_all_rows(small: bool) -> None:
    """Short, long, strided rows, none, and rows more than 2**31 elements apart."""
    for shape in ((0, 64), (1, 32), (333, 768), (70, 7168), (9 if small else 20011, 2048)):
        x_TK = random_values(shape, seed=shape[0]) if shape[0] else torch.zeros(shape).bfloat16()
        check_rows(x_TK, x_TK.cuda(), f"{shape}")
    if small:
        return
    num_rows = 4096
    stride = INT32_LIMIT // (num_rows - 1) // 64 * 64 + 128
    far = torch.empty(num_rows * stride, dtype=torch.bfloat16, device="cuda")
    far_TK = far.view(num_rows, stride)[:, 32 : 32 + 2048]
    x_TK = random_values((num_rows, 2048), seed=5)
    far_TK.copy_(x_TK)
    assert (num_rows - 1) * stride > INT32_LIMIT
    check_rows(x_TK, far_TK, "strided beyond 2**31")


def check_emulation() -> None:
    """Emulated weights are the same bits on host and device."""
    weights = random_values((3, 64, 2048), seed=6)
    for block_format in BlockFormat:
        ref = formats.fake_quantise_fp4(weights, block_format)
        got = formats.fake_quantise_fp4(weights.cuda(), block_format)
        assert_close(f"fake_quantise_fp4 {block_format.value}", ref, got, tolerance=0.0)


def groups_of(*sizes: tuple[int, int]) -> Tensor:
    """groups_T of (expert, number of rows) one after another."""
    return torch.tensor([e for e, num in sizes for _ in range(num)], dtype=torch.int32).cuda()


def check_grouped(groups_T: Tensor, num_outputs: int, width: int) -> Iterator[str]:
    """Every pair of formats on every path the device has; yields the worst errors."""
    generator = torch.Generator().manual_seed(width)
    x_TK = torch.randn(len(groups_T), width, generator=generator).bfloat16().cuda()
    x_TK[0, 3] = float("nan")  # row 0 only
    weights_ENK = torch.randn(6, num_outputs, width, generator=generator).bfloat16().cuda()
    capability = torch.cuda.get_device_capability()
    for weight_format, row_formats in ROW_FORMATS.items():
        weights, _ = quantised(weights_ENK, weight_format)
        for row_format in row_formats:
            rows = x_TK
            if row_format is not None:
                rows = quantise_rows_fp4(x_TK, block_format=row_format)
            expected = float32_product(rows, weights, groups_T)
            paths = [True]
            paths += [False] if can_dot_scaled(capability, row_format, weight_format) else []
            for decode in paths:
                name = f"{row_format.value if row_format else 'bfloat16'} x {weight_format.value}"
                path = "decoded" if decode else "dot_scaled"
                worst = compare_product(
                    f"grouped_fp4 {name} {path} N={num_outputs} K={width}",
                    partial(grouped_fp4, rows, weights, groups_T, decode=decode),
                    expected,
                    groups_T,
                )
                is_native = not decode and multiplies_fp4(capability, row_format, weight_format)
                yield f"{name} {path}{' native' if is_native else ''}: {worst:.2e}"


def float32_product(
    rows: Tensor | BlockScaled, weights: BlockScaled, groups_T: Tensor
) -> tuple[Tensor, Tensor]:
    """float32 (T, N) products and sums of magnitudes; 0 for rows of no expert."""
    rows_TK = formats.dequantise(rows) if isinstance(rows, BlockScaled) else rows.float()
    weights_ENK = formats.dequantise(weights)
    product_TN = rows_TK.new_zeros(len(groups_T), weights_ENK.shape[1])
    magnitude_TN = product_TN.clone()
    for expert, weights_NK in enumerate(weights_ENK):
        of_expert_T = groups_T == expert
        product_TN[of_expert_T] = rows_TK[of_expert_T] @ weights_NK.T
        magnitude_TN[of_expert_T] = rows_TK[of_expert_T].abs() @ weights_NK.abs().T
    return product_TN, magnitude_TN


def compare_product(
    name: str, call: partial[Tensor], expected: tuple[Tensor, Tensor], groups_T: Tensor
) -> float:
    """The largest error over its bound, which is at most 1; equal on two runs."""
    product_TN, magnitude_TN = expected
    out_TN = call()
    assert_close(f"{name}, second run", out_TN, call(), tolerance=0.0)
    assert torch.equal(out_TN.isnan(), product_TN.isnan()), f"{name}: NaN elsewhere"
    assert int((out_TN[(groups_T < 0) | (groups_T > 5)] != 0).sum()) == 0, f"{name}: padding"
    error_TN = (out_TN.float() - product_TN).abs()
    bound_TN = RELATIVE * product_TN.abs() + OF_MAGNITUDES * magnitude_TN
    bad_TN = error_TN > bound_TN  # False where NaN
    assert not bad_TN.any(), f"{name}: {int(bad_TN.sum())} beyond, {bad_TN.nonzero()[:5].tolist()}"
    return float((error_TN / bound_TN.clamp(min=1e-30)).nan_to_num().max())


def check_all_grouped(small: bool) -> None:
    """Experts with 0, 1, 127, 128 and 129 rows, aligned and not, and padding between them."""
    sizes = ((0, 1), (1, 127), (-1, 3), (3, 128), (4, 129), (9, 2), (5, 1), (-1, 300))
    aligned = ((0, 128), (2, 127), (-1, 1), (3, 128), (4, 129), (-1, 127))
    shapes = ((sizes, 130, 160),) if small else (
        (sizes, 130, 160), (sizes, 1536, 2048), (aligned, 2048, 768),
    )  # fmt: skip
    for groups, num_outputs, width in shapes:
        for line in check_grouped(groups_of(*groups), num_outputs, width):
            print(f"  N={num_outputs} K={width} {line} of the bound", flush=True)


def all_bench_cases() -> Iterator[BenchCase]:
    """The cases of the three benchmarks."""
    for op in OPS:
        yield from importlib.import_module(f"bench_{op}").make_cases("cuda")
        torch.cuda.empty_cache()


def print_shares(rows: list[BenchRow]) -> None:
    """Bandwidths as shares of the copy's of the same run, and rates against bmm's."""
    speed = {id(row): row.num_bytes / row.timing.median_us / 1e3 for row in rows}
    copy = next(speed[id(row)] for row in rows if row.op == "copy")
    bmm_us = 0.0
    for row in rows:
        if row.op == "bmm":
            bmm_us = row.timing.median_us
        if row.op in OPS[:2]:
            print(f"{row.op:18}{row.label:40}{speed[id(row)]:7.0f} GB/s "
                  f"{speed[id(row)] / copy:6.1%} of the copy's {copy:.0f}")  # fmt: skip
        if row.op == "grouped_fp4":
            print(f"{row.op:18}{row.label:40}{row.timing.median_us / bmm_us:6.2f} x bmm's time")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description="Check and time the FP4 kernels on a CUDA device.")
    parser.add_argument("--out", type=Path, help="JSON lines file of the times")
    parser.add_argument("--small", action="store_true", help="few small checks, no times")
    parser.add_argument("--num-calls", type=int, default=30, help="timed calls a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("check_fp4.py needs a CUDA device, and torch sees none")
    check_convert(((3, 20, 96), (3, 7, 32)), in_graph=False)
    check_layouts(((3, 130, 96), (3, 7, 32)))
    if not args.small:
        check_convert(((4, 1536, 2048), (4, 2048, 768)), in_graph=True)
        for block_format in FP4:
            values = every_bfloat16()
            ref, globals_ = quantised(values, block_format)
            slot = slot_for(values, block_format, globals_)
            wanted_E = torch.ones(1, dtype=torch.int32, device="cuda")
            convert_fp4((values.cuda(),), wanted_E, (slot,))
            _compare_experts(f"every bfloat16, {block_format.value}", slot, ref, first=0)
        check_convert_beyond_int32()
        torch.cuda.empty_cache()
    print("convert_fp4: equal bit by bit", flush=True)
    check_all_rows(args.small)
    torch.cuda.empty_cache()
    print("quantise_rows_fp4: equal bit by bit", flush=True)
    check_emulation()
    print("fake_quantise_fp4: equal bit by bit on host and device", flush=True)
    check_all_grouped(args.small)
    print("grouped_fp4: within the bound", flush=True)
    if not args.small:
        rows = run_cases(all_bench_cases(), args.num_calls)
        print_shares(rows)
        if args.out is not None:
            write_rows(rows, args.out)


if __name__ == "__main__":
    main()
