"""Layouts of scales equal their written definitions byte by byte, and come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import scale_layout as layout

SHAPES = [(1, 1, 1), (1, 128, 4), (2, 127, 3), (2, 129, 5), (3, 256, 8), (0, 128, 4)]


def random_scales(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_swizzled_byte_of_a_scale_is_where_cublas_defines_it(
    shape: tuple[int, int, int],
) -> None:
    num_experts, num_rows, num_columns = shape
    scales = random_scales(shape)
    flat = layout.swizzle_128x4(scales).flatten(1).tolist()
    tiles_across = -(-num_columns // 4)
    for expert in range(num_experts):
        seen = 0
        for row in range(num_rows):
            for column in range(num_columns):
                tile = (row // 128) * tiles_across + column // 4
                at = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
                assert flat[expert][at] == scales[expert, row, column]
                seen += flat[expert][at]
        assert seen == sum(flat[expert])  # the padding is 0
    assert torch.equal(
        layout.unswizzle_128x4(layout.swizzle_128x4(scales), num_rows, num_columns), scales
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_word_holds_four_scales_of_a_row_and_columns_are_contiguous(
    shape: tuple[int, int, int],
) -> None:
    num_experts, num_rows, num_columns = shape
    scales = random_scales(shape)
    packed = layout.pack_mn_major(scales)
    aligned, num_words = -(-num_rows // 4) * 4, -(-num_columns // 4)
    assert packed.dtype == torch.int32
    assert packed.shape == (num_experts, num_rows, num_words)
    if num_experts:
        assert packed.stride() == (aligned * num_words, 1, aligned)
    for expert in range(num_experts):
        for row in (0, num_rows // 2, num_rows - 1):
            for column in range(num_columns):
                word = packed[expert, row, column // 4].item()
                assert (word >> (8 * (column % 4))) & 255 == scales[expert, row, column]
    assert torch.equal(layout.unpack_mn_major(packed, num_columns), scales)


@pytest.mark.parametrize("layout_of", list(layout.ScaleLayout))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_comes_back_and_has_the_stated_shape(
    layout_of: layout.ScaleLayout, shape: tuple[int, int, int]
) -> None:
    scales = random_scales(shape)
    stored = layout.to_layout(scales, layout_of)
    assert tuple(stored.shape) == layout.stored_shape(shape, layout_of)
    assert torch.equal(layout.to_row_major(stored, layout_of, *shape[1:]), scales)
    assert layout.stored_bytes(stored, layout_of).sum() == scales.sum()
