"""`quantise_rows_fp4` writes the defined bytes of each row, whatever the other rows hold.

Shape letters: T rows, K features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import block_format as formats
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled


@pytest.fixture
def quantise_rows_fp4(load_op: Callable) -> Callable:
    return load_op("quantise_rows_fp4")


def random_rows(num_rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(num_rows, 1, generator=generator) * 6
    x_TK = (torch.randn(num_rows, width, generator=generator) * spread.exp2()).bfloat16()
    bits = torch.randint(-(1 << 15), 1 << 15, (width,), generator=generator).short()
    x_TK[num_rows // 2 :][:1] = bits.view(torch.bfloat16)
    x_TK[num_rows // 3 :][:1] = -0.0
    return x_TK


def assert_equal(got: BlockScaled, x_TK: Tensor, block_format: BlockFormat) -> None:
    globals_T = formats.global_scales(x_TK) if block_format.has_global else None
    codes, scales = formats.quantise_blocks(x_TK, globals_T, block_format)
    assert got.format is block_format
    assert torch.equal(got.codes, codes)
    assert torch.equal(got.scales, scales)
    if globals_T is None:
        assert got.globals is None
    else:
        assert torch.equal(got.globals, globals_T)


def test_the_worked_example_of_the_docstring(quantise_rows_fp4: Callable) -> None:
    x_TK = torch.zeros(1, 16, dtype=torch.bfloat16)
    x_TK[0, :2] = torch.tensor([6.0, -3.0])
    got = quantise_rows_fp4(x_TK, block_format=BlockFormat.NVFP4)
    assert got.codes.tolist() == [[0xD7, *[0] * 7]]
    assert got.scales.tolist() == [[0x7E]]
    assert got.globals.tolist() == pytest.approx([1 / 448])


@pytest.mark.parametrize("block_format", list(BlockFormat))
@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (70, 96), (3, 2048)])
def test_rows_equal_the_definition(
    quantise_rows_fp4: Callable, shape: tuple[int, int], block_format: BlockFormat
) -> None:
    x_TK = random_rows(*shape, seed=shape[0])
    assert_equal(quantise_rows_fp4(x_TK, block_format=block_format), x_TK, block_format)


def test_every_bfloat16_beside_the_largest_e4m3_gets_the_nearest(
    quantise_rows_fp4: Callable,
) -> None:
    values = torch.arange(1 << 16).int().short().view(torch.bfloat16)
    values = values[values.float().abs() <= 448]
    padded = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    x_TK = torch.full((len(padded), 32), 448.0, dtype=torch.bfloat16)
    x_TK[:, :31] = padded
    got = quantise_rows_fp4(x_TK, block_format=BlockFormat.MXFP8)
    assert (got.scales == 127).all()  # 2**0
    assert torch.equal(got.codes[:, :31], formats.e4m3_bits(padded.float()))


@pytest.mark.parametrize("offset", [0, 8, 9])
def test_strided_rows_are_read_where_they_are(quantise_rows_fp4: Callable, offset: int) -> None:
    x_TK = random_rows(20, 200, seed=1)[:, offset : offset + 64]
    for block_format in BlockFormat:
        assert_equal(quantise_rows_fp4(x_TK, block_format=block_format), x_TK, block_format)


def test_a_row_does_not_depend_on_its_neighbours(quantise_rows_fp4: Callable) -> None:
    x_TK = random_rows(9, 64, seed=2)
    loud_TK = x_TK.clone()
    loud_TK[::2] *= 1000
    loud_TK[4, 1] = math.nan
    for block_format in BlockFormat:
        quiet, loud = (quantise_rows_fp4(x, block_format=block_format) for x in (x_TK, loud_TK))
        assert torch.equal(quiet.codes[1::2], loud.codes[1::2])
        assert torch.equal(quiet.scales[1::2], loud.scales[1::2])


@pytest.mark.parametrize("block_format", list(BlockFormat))
def test_what_is_not_finite_makes_its_block_nan_and_leaves_the_row_else_as_if_zero(
    quantise_rows_fp4: Callable, block_format: BlockFormat
) -> None:
    x_TK = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    size = block_format.block_size
    zero_TK = x_TK.clone()
    zero_TK[:3, :size] = 0
    x_TK[0, 0], x_TK[1, size - 1], x_TK[2, 5] = math.nan, math.inf, -math.inf
    values, others = (
        formats.dequantise(quantise_rows_fp4(x, block_format=block_format)) for x in (x_TK, zero_TK)
    )
    assert values[:3, :size].isnan().all()
    assert torch.equal(values[:3, size:], others[:3, size:])
    assert torch.equal(values[3], others[3])


def test_what_cannot_be_quantised_is_refused_with_the_reason() -> None:
    from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4

    with pytest.raises(ValueError, match="bfloat16"):
        quantise_rows_fp4(torch.zeros(2, 32), block_format=BlockFormat.MXFP4)
    with pytest.raises(ValueError, match="48 features"):
        quantise_rows_fp4(torch.zeros(2, 48).bfloat16(), block_format=BlockFormat.MXFP8)
