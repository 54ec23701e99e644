"""Layouts of block scales that grouped GEMMs read, and their inverses. Plain torch, host or device.

Row-major (..., N, S) is what our GEMM reads; `convert_fp4` writes any of them. The others are
permutations of it, with padding.

Shape letters: E experts, N rows, S scales of a row (K over the block size), M rows padded to 128,
C columns padded to 4, W words.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS, TILE_COLUMNS = 128, 4
WORDS_ALIGNMENT = 4  # int32 in the 16 bytes that a TMA row starts at


class ScaleLayout(Enum):
    """Where the scale of a row and column lies: see the function of the same name."""

    ROW_MAJOR = "row_major"
    SWIZZLED_128X4 = "swizzle_128x4"
    MN_MAJOR = "pack_mn_major"


def to_layout(scales: Tensor, layout: ScaleLayout) -> Tensor:
    """Row-major uint8 (..., N, S) in another layout."""
    if layout is ScaleLayout.SWIZZLED_128X4:
        return swizzle_128x4(scales)
    return pack_mn_major(scales) if layout is ScaleLayout.MN_MAJOR else scales


def to_row_major(stored: Tensor, layout: ScaleLayout, num_rows: int, num_columns: int) -> Tensor:
    """The inverse of `to_layout`: uint8 (..., N, S)."""
    if layout is ScaleLayout.SWIZZLED_128X4:
        return unswizzle_128x4(stored, num_rows, num_columns)
    return unpack_mn_major(stored, num_columns) if layout is ScaleLayout.MN_MAJOR else stored


def stored_shape(shape: tuple[int, ...], layout: ScaleLayout) -> tuple[int, ...]:
    """Shape that scales (..., N, S) have in a layout."""
    *lead, num_rows, num_columns = shape
    if layout is ScaleLayout.SWIZZLED_128X4:
        num_rows += -num_rows % TILE_ROWS
        num_columns += -num_columns % TILE_COLUMNS
    elif layout is ScaleLayout.MN_MAJOR:
        num_columns = -(-num_columns // 4)
    return (*lead, num_rows, num_columns)


def stored_bytes(stored: Tensor, layout: ScaleLayout) -> Tensor:
    """The bytes of each expert as a view uint8 (E, bytes) of scales (E, ...), padding included."""
    if layout is not ScaleLayout.MN_MAJOR:
        return stored.flatten(1)
    num_experts, _, num_words = stored.shape
    aligned = stored.stride(-1)
    columns = stored.as_strided((num_experts, num_words * aligned), (num_words * aligned, 1))
    return columns.view(torch.uint8)


def swizzle_128x4(scales: Tensor) -> Tensor:
    """Row-major uint8 (..., N, S) to the layout of tcgen05, cuBLAS, cuDNN and FlashInfer.

    The matrix is padded with 0 to whole tiles of 128 rows by 4 columns. Tiles lie in row-major
    order, 512 bytes each; in a tile, the byte of row r and column c is at (r % 32) * 16 +
    (r // 32) * 4 + c. Source: cuBLAS, "1D block scaling factors layout"; FlashInfer's 128x4.

    Returns:
        uint8 (..., M, C), whose bytes are in that order (its own rows mean nothing).
    """
    num_rows, num_columns = scales.shape[-2:]
    padded = pad(scales, (0, -num_columns % TILE_COLUMNS, 0, -num_rows % TILE_ROWS))
    tiles = padded.unflatten(-2, (-1, 4, 32)).unflatten(-1, (-1, TILE_COLUMNS))
    # From (..., row tile, r // 32, r % 32, column tile, c).
    swizzled: Tensor = tiles.movedim(-2, -4).transpose(-2, -3).reshape(padded.shape)
    return swizzled


def unswizzle_128x4(swizzled: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The inverse of `swizzle_128x4`: uint8 (..., N, S)."""
    rows, columns = swizzled.shape[-2:]
    shape = (rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    tiles = swizzled.flatten(-2).unflatten(-1, shape)
    padded: Tensor = tiles.transpose(-2, -3).movedim(-4, -2).reshape(swizzled.shape)
    return padded[..., :num_rows, :num_columns].contiguous()


def pack_mn_major(scales: Tensor) -> Tensor:
    """Row-major uint8 (..., N, S) e8m0 to DeepGEMM's packed scales of SM100.

    Four scales of a row, byte j of a word the (4w+j)-th, make an int32; a column of words is
    contiguous and padded with 0 to 4 words. Source: DeepGEMM, `get_mn_major_tma_aligned_packed_
    ue8m0_tensor` and `check_sf_layout`.

    Returns:
        int32 (..., N, W) of strides (..., 1, N rounded up to 4), W = ceil(S / 4).
    """
    num_rows, num_columns = scales.shape[-2:]
    padded = pad(scales, (0, -num_columns % 4, 0, -num_rows % WORDS_ALIGNMENT))
    words = padded.contiguous().view(torch.int32)  # little-endian, as every CUDA host is
    columns = words.new_empty(*words.shape[:-2], words.shape[-1], words.shape[-2])
    return columns.copy_(words.transpose(-1, -2)).transpose(-1, -2)[..., :num_rows, :]


def unpack_mn_major(packed: Tensor, num_columns: int) -> Tensor:
    """The inverse of `pack_mn_major`: uint8 (..., N, S)."""
    words = packed.new_empty(packed.shape).copy_(packed)
    return words.view(torch.uint8)[..., :num_columns].contiguous()
