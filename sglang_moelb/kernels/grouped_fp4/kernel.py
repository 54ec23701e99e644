"""Triton kernel of `grouped_fp4`.

A program takes 128 rows by 128 output features and, one after another, the experts that these rows
have: one expert where groups are aligned to 128 rows. Products go through `tl.dot_scaled`, or the
codes are decoded in registers: an e2m1 code times its scale has at most 6 significant bits and an
e4m3 code 4, so bfloat16 holds both exactly. Two features lie in one byte or word, and decoding
keeps the even and the odd ones apart, as two products whose sum is the whole.

Example: K = 32, one expert of one output, MXFP4 codes 2 (1.0) with scale byte 128 (2.0) all over:

    rows (bfloat16, all 1.0)   group   out
    row 0                       0      32 * 1.0 * 2.0 = 64
    row 1                      -1      0

Shape letters: T rows, N output features, K features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.convert_fp4.kernel import E4M3_NAN, E8M0_NAN, MXFP8, NVFP4, e4m3_values
from sglang_moelb.kernels.low_precision import can_dot_scaled

TILE_T, TILE_N, TILE_K = 128, 128, 128

BF16 = tl.constexpr("bf16")
E2M1_TO_FLOAT32 = tl.constexpr(float(1 << 126))  # between the biases of their exponents
FLOAT32_NAN = tl.constexpr(0x7FC00000)
SMALLEST_SCALE = tl.constexpr(1 << 22)  # float32 bits of 2**-127


@triton.jit
def _e2m1_values(codes):
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * E2M1_TO_FLOAT32


@triton.jit
def _halves(words, FORMAT: tl.constexpr):
    """float32 values of the even and of the odd features of words of two."""
    words = words.to(tl.int32)
    if FORMAT == BF16:
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    elif FORMAT == MXFP8:
        even = e4m3_values(words & 255)
        odd = e4m3_values((words >> 8) & 255)
    else:
        even = _e2m1_values(words & 15)
        odd = _e2m1_values((words >> 4) & 15)
    return even, odd


@triton.jit
def _scaled_halves(
    words,
    scales,
    FORMAT: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    even, odd = _halves(words, FORMAT)
    if FORMAT != BF16:
        byte = scales.to(tl.int32)
        if FORMAT == NVFP4:
            value = tl.where(byte == E4M3_NAN, float("nan"), e4m3_values(byte))
        else:
            bits = tl.where(byte == 0, SMALLEST_SCALE, byte << 23)
            bits = tl.where(byte == E8M0_NAN, FLOAT32_NAN, bits)
            value = bits.to(tl.float32, bitcast=True)
        wide = tl.broadcast_to(value[:, :, None], (ROWS, NUM_SCALES, HALF_BLOCK))
        wide = tl.reshape(wide, (ROWS, NUM_SCALES * HALF_BLOCK))
        even *= wide
        odd *= wide
    return even.to(OPERAND), odd.to(OPERAND)


@triton.jit
def _product(
    rows_at,
    row_scales_at,
    weights_at,
    weight_scales_at,
    is_row,
    is_output,
    width,
    ROW_FORMAT: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    ROW_KIND: tl.constexpr,
    ROWS_PACK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """float32 (TILE_T, TILE_N): rows times the weights of one expert, without `globals`."""
    NUM_SCALES: tl.constexpr = TILE_K // BLOCK_SIZE
    row_word = tl.arange(0, TILE_K // ROWS_PACK)[None, :]
    weight_word = tl.arange(0, TILE_K // 2)[None, :]
    scale = tl.arange(0, NUM_SCALES)[None, :]
    acc = tl.zeros([TILE_T, TILE_N], tl.float32)
    for start in range(0, width, TILE_K):
        has_row, has_row_scale = is_row, is_row
        has_weight, has_weight_scale = is_output, is_output
        if not EVEN_K:
            left = width - start
            has_row = is_row & (row_word * ROWS_PACK < left)
            has_row_scale = is_row & (scale * BLOCK_SIZE < left)
            has_weight = is_output & (weight_word * 2 < left)
            has_weight_scale = is_output & (scale * BLOCK_SIZE < left)
        rows = tl.load(rows_at + row_word + start // ROWS_PACK, mask=has_row, other=0)
        weights = tl.load(weights_at + weight_word + start // 2, mask=has_weight, other=0)
        weight_scales = tl.load(
            weight_scales_at + scale + start // BLOCK_SIZE, mask=has_weight_scale, other=0
        )
        row_scales = None
        if ROW_FORMAT != BF16:
            row_scales = tl.load(
                row_scales_at + scale + start // BLOCK_SIZE, mask=has_row_scale, other=0
            )
        if DECODE:
            even_rows, odd_rows = _scaled_halves(
                rows, row_scales, ROW_FORMAT, OPERAND, TILE_T, NUM_SCALES, BLOCK_SIZE // 2
            )
            even, odd = _scaled_halves(
                weights, weight_scales, WEIGHT_FORMAT, OPERAND, TILE_N, NUM_SCALES, BLOCK_SIZE // 2
            )
            acc = tl.dot(even_rows, tl.trans(even), acc, input_precision="ieee")
            acc = tl.dot(odd_rows, tl.trans(odd), acc, input_precision="ieee")
        else:
            if WEIGHT_FORMAT == NVFP4:
                weight_scales = weight_scales.to(tl.float8e4nv, bitcast=True)
                if ROW_FORMAT != BF16:
                    row_scales = row_scales.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(
                rows,
                row_scales,
                ROW_KIND,
                tl.trans(weights),
                weight_scales,
                "e2m1",
                acc,
            )
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _grouped(
    rows_ptr,
    row_scales_ptr,
    row_globals_ptr,
    weights_ptr,
    weight_scales_ptr,
    weight_globals_ptr,
    groups_ptr,
    out_ptr,
    num_rows,
    num_experts,
    num_outputs,
    width,
    ROW_FORMAT: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    ROW_KIND: tl.constexpr,
    ROWS_PACK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    tiles_n = tl.cdiv(num_outputs, TILE_N)
    tile_t = tl.program_id(0) // tiles_n
    row = tl.cast(tile_t, tl.int64) * TILE_T + tl.arange(0, TILE_T)
    output = (tl.program_id(0) % tiles_n) * TILE_N + tl.arange(0, TILE_N)
    is_output = output < num_outputs
    group = tl.load(groups_ptr + row, mask=row < num_rows, other=-1)
    group = tl.where(group < num_experts, group, -1)
    out_at = out_ptr + row[:, None] * num_outputs + output[None, :]
    is_padding = (group < 0) & (row < num_rows)
    zeros = tl.zeros([TILE_T, TILE_N], tl.bfloat16)
    tl.store(out_at, zeros, mask=is_padding[:, None] & is_output[None, :])
    first = tl.min(tl.where(group >= 0, group, num_experts), axis=0)
    for expert in range(first, tl.max(group, axis=0) + 1):
        is_row = group == expert
        if tl.sum(is_row.to(tl.int32), axis=0) > 0:
            weight_row = tl.cast(expert, tl.int64) * num_outputs + output
            num_scales = width // BLOCK_SIZE
            acc = _product(
                rows_ptr + row[:, None] * (width // ROWS_PACK),
                row_scales_ptr + row[:, None] * num_scales,
                weights_ptr + weight_row[:, None] * (width // 2),
                weight_scales_ptr + weight_row[:, None] * num_scales,
                is_row[:, None],
                is_output[:, None],
                width,
                ROW_FORMAT,
                WEIGHT_FORMAT,
                ROW_KIND,
                ROWS_PACK,
                BLOCK_SIZE,
                DECODE,
                OPERAND,
                EVEN_K,
                TILE_T,
                TILE_N,
                TILE_K,
            )
            if WEIGHT_FORMAT == NVFP4:
                acc *= tl.load(weight_globals_ptr + expert)
                if ROW_FORMAT == NVFP4:
                    acc *= tl.load(row_globals_ptr + row, mask=is_row, other=0.0)[:, None]
            tl.store(out_at, acc.to(tl.bfloat16), mask=is_row[:, None] & is_output[None, :])


def grouped_fp4(
    rows: Tensor | BlockScaled,
    weights: BlockScaled,
    groups_T: Tensor,
    *,
    decode: bool | None = None,
) -> Tensor:
    """See `sglang_moelb.kernels.grouped_fp4`. Runs on the device of its tensors, one launch."""
    row_format = rows.format if isinstance(rows, BlockScaled) else None
    if decode is None:
        decode = not _device_can_dot_scaled(weights.codes.device, row_format, weights.format)
    num_experts, num_outputs, half_width = weights.codes.shape
    out_TN = torch.empty(len(groups_T), num_outputs, dtype=torch.bfloat16, device=groups_T.device)
    if not out_TN.numel():
        return out_TN
    _grouped[(triton.cdiv(len(groups_T), TILE_T) * triton.cdiv(num_outputs, TILE_N),)](
        *_row_arguments(rows, groups_T, decode),
        weights.codes,
        weights.scales,
        groups_T if weights.globals is None else weights.globals,
        groups_T,
        out_TN,
        len(groups_T),
        num_experts,
        num_outputs,
        2 * half_width,
        **launch_options(row_format, weights.format, 2 * half_width, decode),
        # NumPy has no bfloat16, so the interpreter multiplies the same values in float32.
        OPERAND=tl.bfloat16 if groups_T.is_cuda else tl.float32,
    )
    return out_TN


def launch_options(
    row_format: BlockFormat | None, weight_format: BlockFormat, width: int, decode: bool
) -> dict[str, object]:
    """Constants of one launch for rows of a format (None: bfloat16) and `width` features."""
    kind = "bf16"
    if row_format is not None:
        kind = "e4m3" if row_format is BlockFormat.MXFP8 else "e2m1"
    return {
        "ROW_FORMAT": _decoded_as(row_format) if row_format else BF16.value,
        "WEIGHT_FORMAT": _decoded_as(weight_format),
        "ROW_KIND": kind,
        "ROWS_PACK": 2 if decode or kind == "e2m1" else 1,
        "BLOCK_SIZE": weight_format.block_size,
        "DECODE": decode,
        "EVEN_K": width % TILE_K == 0,
        "TILE_T": TILE_T,
        "TILE_N": TILE_N,
        "TILE_K": TILE_K,
        "num_warps": 8,
    }


def _decoded_as(block_format: BlockFormat) -> str:
    """The two MXFP4 differ in how scales are chosen, not in what they mean: one kernel for both."""
    return (BlockFormat.MXFP4 if block_format is BlockFormat.MXFP4_CEIL else block_format).value


def _row_arguments(
    rows: Tensor | BlockScaled, none: Tensor, decode: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as the kernel reads them, their scales and globals; `none` for what is absent."""
    if not isinstance(rows, BlockScaled):
        rows = rows.contiguous()
        return rows.view(torch.int32) if decode else rows, none, none
    is_fp8 = rows.format is BlockFormat.MXFP8
    codes = rows.codes.view(torch.uint16) if is_fp8 and decode else rows.codes
    return codes, rows.scales, none if rows.globals is None else rows.globals


def _device_can_dot_scaled(
    device: torch.device, row_format: BlockFormat | None, weight_format: BlockFormat
) -> bool:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return can_dot_scaled(capability, row_format, weight_format)
