"""Triton kernel of `convert_fp4`, and the device functions that block formats share.

Blocks of one expert follow each other in memory, whatever N and K are, so a program takes a run of
blocks of one expert and tensor. It reads two elements as one 32-bit word: half of them sit in the
low bits, as their codes will. Rounding is integer arithmetic, because Hopper cannot convert to
e2m1.

Example: MXFP4, one block of 32 that begins 1, -2.6, 0.3, -0.1 and is else 0:

    amax 2.6, floor(log2) = 1, scale 2**(1 - 2): byte 126
    scaled 2, -5.2, 0.6, -0.2: codes 4, 8 + 7 (6 is nearer than 4), 1, 8 (-0)
    bytes 4 | 15 << 4 = 0xf4, 1 | 8 << 4 = 0x81, then 0

Shape letters: E local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import block_format
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled

TILE_WORDS = 4096

FLOAT32_MAX = tl.constexpr(block_format.FLOAT32_MAX)
SIXTH = tl.constexpr(block_format.SIXTH)
E8M0_NAN = tl.constexpr(block_format.E8M0_NAN)
E4M3_NAN = tl.constexpr(block_format.E4M3_NAN)
NOT_FINITE = tl.constexpr(0x7F80)  # bfloat16 bits of inf; those of NaN are larger
NVFP4 = tl.constexpr(BlockFormat.NVFP4.value)
MXFP4_CEIL = tl.constexpr(BlockFormat.MXFP4_CEIL.value)
MXFP8 = tl.constexpr(BlockFormat.MXFP8.value)
# A float32 sum with one of these rounds to multiples of 1/2 and of 2**-9: the steps of the smallest
# e2m1 and e4m3 values. The low bits of the sum are then the code.
ROUND_TO_HALVES = tl.constexpr(float(1 << 22))
ROUND_TO_E4M3 = tl.constexpr(float(1 << 14))
E4M3_TO_FLOAT32 = tl.constexpr(float(1 << 120))  # between the biases of their exponents


@triton.jit
def e2m1_codes(x):
    """int32 codes 0..15 of float32 values."""
    magnitude = tl.minimum(tl.abs(x), 6.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    small = (magnitude + ROUND_TO_HALVES).to(tl.int32, bitcast=True) & 7
    # One bit of mantissa is kept, so codes count from bits 252 of exponent and mantissa.
    large = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(magnitude < 1.0, small, large) | sign


@triton.jit
def e4m3_bits(x):
    """int32 bits of float32 values, saturated at 448."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    small = (magnitude + ROUND_TO_E4M3).to(tl.int32, bitcast=True) & 15
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    return tl.where(magnitude < 0.015625, small, large) | sign


@triton.jit
def e4m3_values(bits):
    """float32 values of int32 bits 0..255 that are not NaN."""
    shifted = ((bits & 127) << 20) | ((bits & 128) << 24)
    return shifted.to(tl.float32, bitcast=True) * E4M3_TO_FLOAT32


@triton.jit
def words_amax(words, axis: tl.constexpr):
    """bfloat16 bits, as int32, of the largest magnitude of words of two elements along an axis.

    Integers order like the magnitudes do, with inf and then NaN above all.
    """
    return tl.max(tl.maximum(words & 0x7FFF, (words >> 16) & 0x7FFF), axis=axis)


@triton.jit
def block_scale(amax_bits, encoder, FORMAT: tl.constexpr):
    """int32 scale byte of blocks and the float32 factor that brings them into range."""
    amax = (amax_bits << 16).to(tl.float32, bitcast=True)
    is_finite = amax_bits < NOT_FINITE
    if FORMAT == NVFP4:
        amax = tl.where(is_finite, amax, 0.0)
        byte = e4m3_bits(amax * (encoder * SIXTH))
        value = e4m3_values(byte) * tl.div_rn(1.0, encoder)
        factor = tl.minimum(tl.div_rn(1.0, value), FLOAT32_MAX)  # 1 / 0 where a scale underflowed
        factor = tl.where(amax > 0, factor, 0.0)
        return tl.where(is_finite, byte, E4M3_NAN), factor
    else:
        exponent = amax_bits >> 7
        if FORMAT == MXFP4_CEIL:
            exponent += ((amax_bits & 127) > 64).to(tl.int32)
        byte = tl.maximum(exponent - (8 if FORMAT == MXFP8 else 2), 0)
        byte = tl.where(is_finite, byte, E8M0_NAN)
        return byte, tl.where(is_finite, (254 - byte) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def word_codes(words, factor, amax_bits, FORMAT: tl.constexpr):
    """Codes of words of two elements, 0 where not finite: e2m1 in 8 bits, or e4m3 in 16."""
    low = (words << 16).to(tl.float32, bitcast=True) * factor
    high = (words & -65536).to(tl.float32, bitcast=True) * factor
    if FORMAT == MXFP8:
        codes = e4m3_bits(low) | (e4m3_bits(high) << 8)
    else:
        codes = e2m1_codes(low) | (e2m1_codes(high) << 4)
    return tl.where(amax_bits < NOT_FINITE, codes, 0)


@triton.jit
def _convert_tile(
    words_ptr,
    codes_ptr,
    scales_ptr,
    globals_ptr,
    expert,
    tile,
    num_blocks,
    FORMAT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    encoder = 1.0
    if FORMAT == NVFP4:
        encoder = tl.minimum(tl.div_rn(1.0, tl.load(globals_ptr + expert)), FLOAT32_MAX)
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = block < num_blocks
    start = tl.cast(expert, tl.int64) * num_blocks
    word = block[:, None] * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
    words = tl.load(words_ptr + start * BLOCK_WORDS + word, mask=inside[:, None], other=0)
    amax_bits = words_amax(words, 1)
    byte, factor = block_scale(amax_bits, encoder, FORMAT)
    codes = word_codes(words, factor[:, None], amax_bits[:, None], FORMAT)
    codes_at = codes_ptr + start * BLOCK_WORDS + word
    tl.store(codes_at, codes.to(tl.uint8), mask=inside[:, None])
    tl.store(scales_ptr + start + block, byte.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["num_experts"])
def _convert(
    words_a_ptr,
    codes_a_ptr,
    scales_a_ptr,
    globals_a_ptr,
    words_b_ptr,
    codes_b_ptr,
    scales_b_ptr,
    globals_b_ptr,
    wanted_ptr,
    num_experts,
    num_blocks_a,
    num_blocks_b,
    FORMAT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    tiles_a = tl.cdiv(num_blocks_a, TILE_BLOCKS)
    tiles = tiles_a + tl.cdiv(num_blocks_b, TILE_BLOCKS)
    for item in range(tl.program_id(0), num_experts * tiles, tl.num_programs(0)):
        expert = item // tiles
        tile = item % tiles
        if tl.load(wanted_ptr + expert) != 0:
            if tile < tiles_a:
                _convert_tile(
                    words_a_ptr,
                    codes_a_ptr,
                    scales_a_ptr,
                    globals_a_ptr,
                    expert,
                    tile,
                    num_blocks_a,
                    FORMAT,
                    BLOCK_WORDS,
                    TILE_BLOCKS,
                )
            else:
                _convert_tile(
                    words_b_ptr,
                    codes_b_ptr,
                    scales_b_ptr,
                    globals_b_ptr,
                    expert,
                    tile - tiles_a,
                    num_blocks_b,
                    FORMAT,
                    BLOCK_WORDS,
                    TILE_BLOCKS,
                )


def convert_fp4(
    weights: tuple[Tensor, ...],
    wanted_E: Tensor,
    out: tuple[BlockScaled, ...],
    *,
    num_programs: int = 0,
) -> None:
    """See `sglang_moelb.kernels.convert_fp4`. Runs on the device of its tensors, one launch."""
    block_words = out[0].format.block_size // 2
    tile_blocks = TILE_WORDS // block_words
    parts: list[Tensor] = []
    num_blocks = []
    for tensor, slot in zip(weights, out, strict=True):
        globals_ = wanted_E if slot.globals is None else slot.globals
        parts += [tensor.view(torch.int32), slot.codes, slot.scales, globals_]
        num_blocks.append(tensor[0].numel() // slot.format.block_size if len(tensor) else 0)
    if len(weights) == 1:
        parts, num_blocks = parts * 2, [*num_blocks, 0]
    tiles = len(weights[0]) * sum(triton.cdiv(blocks, tile_blocks) for blocks in num_blocks)
    if tiles:
        _convert[(min(tiles, num_programs or tiles),)](
            *parts,
            wanted_E,
            len(weights[0]),
            *num_blocks,
            FORMAT=out[0].format.value,
            BLOCK_WORDS=block_words,
            TILE_BLOCKS=tile_blocks,
            num_warps=8,
        )
