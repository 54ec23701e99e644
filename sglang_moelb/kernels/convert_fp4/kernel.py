"""Triton kernel of `convert_fp4`, and the device functions that block formats share.

Blocks of one expert follow each other in memory, whatever N and K are, so a program takes a run of
blocks of one expert and tensor. It reads two elements as one 32-bit word: half of them sit in the
low bits, as their codes will. Rounding is left to a float32 sum (`e2m1_codes`), because Hopper
cannot convert to e2m1.

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
from sglang_moelb.kernels.scale_layout import ScaleLayout, stored_bytes

TILE_WORDS = 4096

FLOAT32_MAX = tl.constexpr(block_format.FLOAT32_MAX)
SIXTH = tl.constexpr(block_format.SIXTH)
E8M0_NAN = tl.constexpr(block_format.E8M0_NAN)
E4M3_NAN = tl.constexpr(block_format.E4M3_NAN)
NOT_FINITE = tl.constexpr(0x7F800000)  # float32 bits of inf; those of NaN are larger
NVFP4 = tl.constexpr(BlockFormat.NVFP4.value)
MXFP4_CEIL = tl.constexpr(BlockFormat.MXFP4_CEIL.value)
MXFP8 = tl.constexpr(BlockFormat.MXFP8.value)
SWIZZLED_128X4 = tl.constexpr(ScaleLayout.SWIZZLED_128X4.value)
MN_MAJOR = tl.constexpr(ScaleLayout.MN_MAJOR.value)
TWO_TO_MINUS_22 = tl.constexpr(2.0**-22)
TWO_TO_MINUS_20 = tl.constexpr(2.0**-20)
E4M3_TO_FLOAT32 = tl.constexpr(float(1 << 120))  # between the biases of their exponents


@triton.jit
def e2m1_codes(magnitude):
    """int32 whose low 4 bits are the codes 0..7 of float32 magnitudes up to 6; others are not.

    Two codes make an octave, above 1; below, the steps of the first octave go on. Added to the
    power of two that begins its octave, 2**-22 of a magnitude is rounded to those steps, which are
    then counted in the low bits; the exponent counts the octaves.
    """
    octave = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 127 << 23)
    stepped = magnitude * TWO_TO_MINUS_22 + octave.to(tl.float32, bitcast=True)
    bits = stepped.to(tl.int32, bitcast=True)
    return bits + (bits >> 22) + 2  # minus the bias 127 * 2, modulo 16


@triton.jit
def e4m3_bits(x):
    """int32 bits of float32 values, saturated at 448: as `e2m1_codes`, eight to an octave."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    octave = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    stepped = magnitude * TWO_TO_MINUS_20 + octave.to(tl.float32, bitcast=True)
    bits = stepped.to(tl.int32, bitcast=True)
    code = bits + (bits >> 20) + 56  # minus the biases (127 - 7 + 1) * 8, modulo 128
    return (code & 127) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)


@triton.jit
def e4m3_values(bits):
    """float32 values of int32 bits 0..255 that are not NaN."""
    shifted = ((bits & 127) << 20) | ((bits & 128) << 24)
    return shifted.to(tl.float32, bitcast=True) * E4M3_TO_FLOAT32


@triton.jit
def halves(words):
    """float32 values of the two bfloat16 of 32-bit words: the low and the high."""
    low = (words << 16).to(tl.float32, bitcast=True)
    return low, (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def words_amax(words, axis: tl.constexpr):
    """float32 bits, as int32, of the largest magnitude of words of two elements along an axis.

    Bits order like the magnitudes do, with inf and then NaN above all.
    """
    low, high = halves(words)
    pair = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(pair.to(tl.int32, bitcast=True), axis=axis)


@triton.jit
def block_scale(amax_bits, encoder, FORMAT: tl.constexpr):
    """int32 scale byte of blocks and the float32 factor that brings them into range."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    is_finite = amax_bits < NOT_FINITE
    if FORMAT == NVFP4:
        amax = tl.where(is_finite, amax, 0.0)
        byte = e4m3_bits(amax * (encoder * SIXTH))
        value = e4m3_values(byte) * tl.div_rn(1.0, encoder)
        factor = tl.minimum(tl.div_rn(1.0, value), FLOAT32_MAX)  # 1 / 0 where a scale underflowed
        factor = tl.where(amax > 0, factor, 0.0)
        return tl.where(is_finite, byte, E4M3_NAN), factor
    else:
        exponent = amax_bits >> 23
        if FORMAT == MXFP4_CEIL:
            exponent += ((amax_bits & 0x7FFFFF) > 0x400000).to(tl.int32)
        byte = tl.maximum(exponent - (8 if FORMAT == MXFP8 else 2), 0)
        byte = tl.where(is_finite, byte, E8M0_NAN)
        return byte, tl.where(is_finite, (254 - byte) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def word_codes(words, factor, amax_bits, FORMAT: tl.constexpr):
    """Codes of words of two elements, 0 where not finite: e2m1 in the low 8 bits, or e4m3 in 16."""
    low, high = halves(words)
    low *= factor
    high *= factor
    if FORMAT == MXFP8:
        codes = e4m3_bits(low) | (e4m3_bits(high) << 8)
    else:
        low_code = e2m1_codes(tl.minimum(tl.abs(low), 6.0))
        high_code = e2m1_codes(tl.minimum(tl.abs(high), 6.0))
        # Whole words go on, with whatever is above the 4 bits that count: it is cut off in the end.
        low_code = (low_code & 7) | ((words >> 12) & -8)
        high_code = (high_code & 7) | ((words >> 28) & -8)
        codes = (low_code & 15) | (high_code << 4)
    return tl.where(amax_bits < NOT_FINITE, codes, 0)


@triton.jit
def _scale_offset(block, num_columns, num_rows, LAYOUT: tl.constexpr):
    """Where in an expert's bytes the scale of a block lies, as `scale_layout` defines it."""
    row = block // num_columns
    column = block % num_columns
    if LAYOUT == SWIZZLED_128X4:
        tile = (row // 128) * tl.cdiv(num_columns, 4) + column // 4
        offset = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
    elif LAYOUT == MN_MAJOR:
        offset = ((column // 4) * (tl.cdiv(num_rows, 4) * 4) + row) * 4 + column % 4
    else:
        offset = block
    return offset


@triton.jit
def _convert_tile(
    words_ptr,
    codes_ptr,
    scales_ptr,
    globals_ptr,
    expert,
    tile,
    num_blocks,
    num_columns,
    scales_stride,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
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
    offset = _scale_offset(block, num_columns, num_blocks // num_columns, LAYOUT)
    scales_at = scales_ptr + tl.cast(expert, tl.int64) * scales_stride + offset
    tl.store(scales_at, byte.to(tl.uint8), mask=inside)


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
    num_columns_a,
    scales_stride_a,
    num_blocks_b,
    num_columns_b,
    scales_stride_b,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
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
                    num_columns_a,
                    scales_stride_a,
                    FORMAT,
                    LAYOUT,
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
                    num_columns_b,
                    scales_stride_b,
                    FORMAT,
                    LAYOUT,
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
    if not weights[0].numel() and not weights[-1].numel():
        return
    parts: list[Tensor] = []
    sizes: list[int] = []
    tiles = 0
    for tensor, slot in zip(weights, out, strict=True):
        stored = stored_bytes(slot.scales, slot.layout)
        globals_ = wanted_E if slot.globals is None else slot.globals
        parts += [tensor.view(torch.int32), slot.codes, stored, globals_]
        num_columns = tensor.shape[2] // slot.format.block_size
        sizes += [tensor.shape[1] * num_columns, num_columns, stored.stride(0)]
        tiles += len(tensor) * triton.cdiv(tensor.shape[1] * num_columns, tile_blocks)
    if len(weights) == 1:
        parts, sizes = parts * 2, [*sizes, 0, 1, 0]
    _convert[(min(tiles, num_programs or tiles),)](
        *parts,
        wanted_E,
        len(weights[0]),
        *sizes,
        FORMAT=out[0].format.value,
        LAYOUT=out[0].layout.value,
        BLOCK_WORDS=block_words,
        TILE_BLOCKS=tile_blocks,
        num_warps=8,
    )
