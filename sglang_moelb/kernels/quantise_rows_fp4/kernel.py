"""Triton kernel of `quantise_rows_fp4`: whole rows a program, several if they are short.

Example: NVFP4, one row of 16 that begins 6, -3 and is else 0:

    amax 6, global 6 / 2688 = 1/448, so the block's scale is 448: byte 0x7e
    codes 7 (6 = 6 * 448 / 448), 13 (-3): byte 7 | 13 << 4 = 0xd7, then 0

Shape letters: T rows, K features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import block_format as formats
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.convert_fp4.kernel import (
    FLOAT32_MAX,
    NOT_FINITE,
    NVFP4,
    block_scale,
    word_codes,
    words_amax,
)

TILE_WORDS = 2048

LARGEST = tl.constexpr(formats.E4M3_MAX * formats.E2M1_MAX)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise(
    words_ptr,
    codes_ptr,
    scales_ptr,
    globals_ptr,
    num_rows,
    row_stride,
    NUM_BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    block = tl.arange(0, TILE_BLOCKS)
    is_block = (row < num_rows)[:, None] & (block < NUM_BLOCKS)[None, :]
    word = block[None, :, None] * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, None, :]
    words_at = words_ptr + row[:, None, None] * row_stride + word
    words = tl.load(words_at, mask=is_block[:, :, None], other=0)
    amax_bits = words_amax(words, 2)
    encoder = 1.0
    if FORMAT == NVFP4:
        row_bits = tl.max(tl.where(amax_bits < NOT_FINITE, amax_bits, 0), axis=1)
        row_amax = row_bits.to(tl.float32, bitcast=True)
        row_global = tl.where(row_bits > 0, tl.div_rn(row_amax, LARGEST), 1.0)
        tl.store(globals_ptr + row, row_global, mask=row < num_rows)
        encoder = tl.minimum(tl.div_rn(1.0, row_global), FLOAT32_MAX)[:, None]
    byte, factor = block_scale(amax_bits, encoder, FORMAT)
    codes = word_codes(words, factor[:, :, None], amax_bits[:, :, None], FORMAT)
    codes_at = codes_ptr + row[:, None, None] * (NUM_BLOCKS * BLOCK_WORDS) + word
    tl.store(codes_at, codes.to(codes_ptr.dtype.element_ty), mask=is_block[:, :, None])
    scales_at = scales_ptr + row[:, None] * NUM_BLOCKS + block[None, :]
    tl.store(scales_at, byte.to(tl.uint8), mask=is_block)


def quantise_rows_fp4(x_TK: Tensor, *, block_format: BlockFormat) -> BlockScaled:
    """See `sglang_moelb.kernels.quantise_rows_fp4`. Runs on the device of its tensors, no sync."""
    num_rows, width = x_TK.shape
    if x_TK.stride(1) != 1 or x_TK.stride(0) % 2 or x_TK.storage_offset() % 2:
        x_TK = x_TK.contiguous()  # elements are read two at a time
    num_blocks, block_words = width // block_format.block_size, block_format.block_size // 2
    like = {"device": x_TK.device, "dtype": torch.uint8}
    codes = torch.empty(num_rows, width // block_format.codes_per_byte, **like)
    scales = torch.empty(num_rows, num_blocks, **like)
    globals_T = None
    if block_format.has_global:
        globals_T = torch.empty(num_rows, dtype=torch.float32, device=x_TK.device)
    result = BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_T)
    if num_rows == 0 or width == 0:
        return result
    is_fp8 = block_format is BlockFormat.MXFP8
    tile_blocks = triton.next_power_of_2(num_blocks)
    tile_rows = max(1, TILE_WORDS // (tile_blocks * block_words))
    _quantise[(triton.cdiv(num_rows, tile_rows),)](
        x_TK.view(torch.int32),
        codes.view(torch.uint16) if is_fp8 else codes,
        scales,
        scales if globals_T is None else globals_T,
        num_rows,
        x_TK.stride(0) // 2,
        NUM_BLOCKS=num_blocks,
        FORMAT=block_format.value,
        BLOCK_WORDS=block_words,
        TILE_ROWS=tile_rows,
        TILE_BLOCKS=tile_blocks,
        num_warps=4,
    )
    return result
