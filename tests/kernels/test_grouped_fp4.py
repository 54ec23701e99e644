"""`grouped_fp4` gives each row its expert's product, in every pair of formats.

Under the interpreter the codes are decoded in registers: it has no `tl.dot_scaled`. That path is
run on a GPU by tests/gpu/check_fp4.py, and compiled here for GPUs that this host need not have.

Shape letters: T rows, E local experts, N output features, K features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import block_format as formats
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.convert_fp4 import convert_fp4
from sglang_moelb.kernels.grouped_fp4.ref import ROW_FORMATS
from sglang_moelb.kernels.low_precision import multiplies_fp4
from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4
from sglang_moelb.kernels.scale_layout import ScaleLayout
from tests.kernels.conftest import INTERPRETED

PAIRS = [
    (rows, weights)
    for weights in (BlockFormat.MXFP4, BlockFormat.NVFP4)
    for rows in (None, BlockFormat.MXFP8, BlockFormat.MXFP4, BlockFormat.NVFP4)
    if rows in ROW_FORMATS[weights]
]


@pytest.fixture
def grouped_fp4(load_op: Callable) -> Callable:
    return load_op("grouped_fp4")


def quantised_weights(weights: Tensor, block_format: BlockFormat) -> BlockScaled:
    empty = formats.empty_block_scaled(tuple(weights.shape), block_format, "cpu")
    globals_ = formats.global_scales(weights) if block_format.has_global else None
    slot = BlockScaled(
        format=block_format, codes=empty.codes, scales=empty.scales, globals=globals_
    )
    convert_fp4((weights,), torch.ones(len(weights), dtype=torch.int32), (slot,))
    return slot


def quantised_rows(x_TK: Tensor, row_format: BlockFormat | None) -> Tensor | BlockScaled:
    return x_TK if row_format is None else quantise_rows_fp4(x_TK, block_format=row_format)


def groups_of(sizes: Iterable[tuple[int, int]]) -> Tensor:
    """groups_T of (expert, number of rows) one after another."""
    return torch.tensor([e for e, num in sizes for _ in range(num)], dtype=torch.int32)


def inputs(groups_T: Tensor, num_outputs: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(len(groups_T), width, generator=generator).bfloat16()
    return x_TK, torch.randn(5, num_outputs, width, generator=generator).bfloat16()


def expected_rows(rows: Tensor | BlockScaled, weights: BlockScaled, groups_T: Tensor) -> Tensor:
    """Row by row in float64."""
    values = formats.dequantise(rows) if isinstance(rows, BlockScaled) else rows.float()
    weights_ENK = formats.dequantise(weights).double()
    out_TN = torch.zeros(len(groups_T), weights_ENK.shape[1], dtype=torch.float64)
    for t, expert in enumerate(groups_T.tolist()):
        if 0 <= expert < len(weights_ENK):
            out_TN[t] = weights_ENK[expert] @ values[t].double()
    return out_TN


def assert_near(got_TN: Tensor, expected_TN: Tensor) -> None:
    """Within one bfloat16 step (the interpreter cuts where the device rounds) of the sum's size."""
    assert got_TN.dtype == torch.bfloat16
    assert torch.equal(got_TN.isnan(), expected_TN.isnan())
    error = (got_TN.double() - expected_TN).abs().nan_to_num()
    assert (error <= 2**-7 * expected_TN.abs().nan_to_num() + 1e-3).all()


def test_the_worked_example_of_the_docstring(grouped_fp4: Callable) -> None:
    weights = BlockScaled(
        format=BlockFormat.MXFP4,
        codes=torch.full((1, 1, 16), 0x22, dtype=torch.uint8),
        scales=torch.full((1, 1, 1), 128, dtype=torch.uint8),
    )
    rows = torch.ones(2, 32, dtype=torch.bfloat16)
    assert grouped_fp4(rows, weights, groups_of([(0, 1), (-1, 1)])).tolist() == [[64.0], [0.0]]


@pytest.mark.parametrize(("row_format", "weight_format"), PAIRS)
def test_every_pair_of_formats_equals_the_product_row_by_row(
    grouped_fp4: Callable, row_format: BlockFormat | None, weight_format: BlockFormat
) -> None:
    groups_T = groups_of([(0, 3), (-1, 2), (1, 1), (4, 5)])
    x_TK, weights_ENK = inputs(groups_T, 40, 160, seed=1)
    x_TK[1, 4] = math.nan
    rows = quantised_rows(x_TK, row_format)
    weights = quantised_weights(weights_ENK, weight_format)
    out_TN = grouped_fp4(rows, weights, groups_T)
    assert_near(out_TN, expected_rows(rows, weights, groups_T))
    assert out_TN.isnan().any(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129])
def test_experts_of_any_number_of_rows_beside_others(grouped_fp4: Callable, num_rows: int) -> None:
    groups_T = groups_of([(0, 1), (2, num_rows), (3, 2), (-1, 3)])
    x_TK, weights_ENK = inputs(groups_T, 8, 32, seed=num_rows)
    weights = quantised_weights(weights_ENK, BlockFormat.MXFP4)
    out_TN = grouped_fp4(x_TK, weights, groups_T)
    assert_near(out_TN, expected_rows(x_TK, weights, groups_T))
    assert (out_TN[-3:] == 0).all()


def test_rows_of_no_expert_come_out_zero_and_are_not_read(grouped_fp4: Callable) -> None:
    groups_T = groups_of([(-1, 130), (5, 2), (1, 1)])
    x_TK, weights_ENK = inputs(groups_T, 8, 64, seed=2)
    x_TK[:132] = math.nan
    weights = quantised_weights(weights_ENK, BlockFormat.NVFP4)
    out_TN = grouped_fp4(x_TK, weights, groups_T)
    assert (out_TN[:132] == 0).all()
    assert out_TN[132].isfinite().all()
    assert grouped_fp4(x_TK[:0], weights, groups_T[:0]).shape == (0, 8)


def test_a_poisoned_expert_leaves_the_rows_of_others_alone(grouped_fp4: Callable) -> None:
    groups_T = groups_of([(0, 3), (1, 3)])
    x_TK, weights_ENK = inputs(groups_T, 8, 64, seed=3)
    weights_ENK[1, 2, 5] = math.inf
    out_TN = grouped_fp4(x_TK, quantised_weights(weights_ENK, BlockFormat.MXFP4), groups_T)
    assert out_TN[:3].isfinite().all()
    assert out_TN[3:].isnan().nonzero()[:, 1].tolist() == [2, 2, 2]


def test_the_smallest_scale_is_a_number_not_zero(grouped_fp4: Callable) -> None:
    weights = BlockScaled(
        format=BlockFormat.MXFP4,
        codes=torch.full((1, 1, 16), 0x22, dtype=torch.uint8),
        scales=torch.zeros(1, 1, 1, dtype=torch.uint8),
    )
    rows = torch.full((1, 32), 2.0**100, dtype=torch.bfloat16)
    assert grouped_fp4(rows, weights, groups_of([(0, 1)])).item() == 32 * 2.0**-27


def test_a_nan_scale_gives_nan_whatever_the_codes(grouped_fp4: Callable) -> None:
    weights = BlockScaled(
        format=BlockFormat.MXFP4,
        codes=torch.full((1, 2, 16), 0x22, dtype=torch.uint8),
        scales=torch.tensor([[[255], [127]]], dtype=torch.uint8),
    )
    out_TN = grouped_fp4(torch.ones(1, 32).bfloat16(), weights, groups_of([(0, 1)]))
    assert out_TN.isnan().tolist() == [[True, False]]


def test_formats_that_no_instruction_multiplies_are_refused_by_name() -> None:
    from sglang_moelb.kernels.grouped_fp4 import grouped_fp4

    x_TK, weights_ENK = inputs(groups_of([(0, 2)]), 4, 32, seed=4)
    weights = quantised_weights(weights_ENK, BlockFormat.NVFP4)
    groups_T = groups_of([(0, 2)])
    with pytest.raises(ValueError, match="mxfp8 rows on nvfp4 weights"):
        grouped_fp4(quantised_rows(x_TK, BlockFormat.MXFP8), weights, groups_T)
    swizzled = formats.empty_block_scaled(
        (5, 4, 32), BlockFormat.NVFP4, "cpu", ScaleLayout.SWIZZLED_128X4
    )
    with pytest.raises(ValueError, match="row-major scales, got swizzle_128x4"):
        grouped_fp4(x_TK, swizzled, groups_T)
    with pytest.raises(ValueError, match="32 features"):
        grouped_fp4(x_TK, weights, groups_T[:1])
    with pytest.raises(ValueError, match="float32"):
        grouped_fp4(x_TK.float(), weights, groups_T)


@pytest.mark.skipif(INTERPRETED, reason="compiling needs functions that are not interpreted")
@pytest.mark.parametrize(
    ("capability", "row_format", "weight_format", "instruction"),
    [
        ((9, 0), BlockFormat.MXFP4, BlockFormat.MXFP4, r"wgmma\S*bf16\.bf16"),
        ((10, 3), BlockFormat.MXFP8, BlockFormat.MXFP4, r"tcgen05\.mma\S*mxf8f6f4\.block_scale"),
        ((10, 0), BlockFormat.NVFP4, BlockFormat.NVFP4, r"tcgen05\.mma\S*mxf4nvf4\S*scale_vec::4X"),
        ((12, 0), BlockFormat.NVFP4, BlockFormat.NVFP4, r"mma\.sync\S*mxf4nvf4\S*ue4m3"),
    ],
)
def test_dot_scaled_compiles_to_the_instruction_of_the_device(
    capability: tuple[int, int],
    row_format: BlockFormat,
    weight_format: BlockFormat,
    instruction: str,
) -> None:
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    from sglang_moelb.kernels.grouped_fp4 import kernel

    constants = kernel.launch_options(row_format, weight_format, 2048, decode=False)
    num_warps = constants.pop("num_warps")
    constants["OPERAND"] = triton.language.bfloat16
    types = dict.fromkeys(kernel._grouped.arg_names, "constexpr")
    for name in types:
        if name.endswith("_ptr"):
            types[name] = "*fp32" if "globals" in name else "*u8"
        elif name not in constants:
            types[name] = "i32"
    types |= {"groups_ptr": "*i32", "out_ptr": "*bf16"}
    source = triton.compiler.ASTSource(kernel._grouped, types, constants)
    target = compiler.GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    assert re.search(instruction, compiled.asm["ptx"])
    is_native = "block_scale" in compiled.asm["ptx"]
    assert is_native == multiplies_fp4(capability, row_format, weight_format)
