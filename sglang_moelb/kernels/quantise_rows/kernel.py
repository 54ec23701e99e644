"""Triton kernels of `quantise_rows` and its siblings: a program takes some rows of one group.

Neighbouring programs take the groups of the same rows, so that memory is read in whole rows.

Example: one group whose largest value is 448 is its own fp8 with the scale 1; one of -4.48 and 0.01
has the scale 0.01 and the fp8 -448 and 1.

Shape letters: T rows, H features, N gate and up features, I features between GEMMs, G groups,
e local experts, M rows that one has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import fp8, fp8_device
from sglang_moelb.kernels.launch import Launcher, variant_of
from sglang_moelb.kernels.quantise_rows.ref import (
    NAN_BYTE,
    check_masked,
    check_rows,
    empty_masked_scales,
    empty_scales,
    empty_words,
)

TILE_ROWS = 32
NUM_WARPS = 4
# In decode an expert has few rows: a tile of them, and few programs that find nothing to do.
MASKED_TILE_ROWS, MAX_WALKERS = 16, 4

GROUP = fp8_device.GROUP
E8M0_NAN = tl.constexpr(NAN_BYTE)


# Not by values that change with the batch: compiling in a live pass makes the other ranks wait. The
# stride of rows is that of the model's hidden states.
@triton.jit(
    do_not_specialize=["num_rows", "scale_row_stride", "scale_group_stride"],
    do_not_specialize_on_alignment=["num_valid_ptr"],
)
def _quantise(
    x_ptr,
    q_ptr,
    scale_ptr,
    num_valid_ptr,
    num_rows,
    scale_row_stride,
    scale_group_stride,
    X_STRIDE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    group = tl.program_id(0) % NUM_GROUPS
    first_row = tl.program_id(0) // NUM_GROUPS * TILE_ROWS
    num_valid = num_rows
    if HAS_NUM_VALID:
        num_valid = tl.minimum(num_rows, tl.load(num_valid_ptr))
    if first_row >= num_valid:
        return
    _quantise_tile(
        x_ptr, q_ptr, scale_ptr, first_row, num_valid, group,
        X_STRIDE, scale_row_stride, scale_group_stride, NUM_GROUPS, IS_GATED, TILE_ROWS,
    )  # fmt: skip


# Of each expert only the rows that have arrived, so its programs walk over as many as those are.
@triton.jit(do_not_specialize=["max_rows"], do_not_specialize_on_alignment=["num_rows_ptr"])
def _quantise_masked(
    x_ptr,
    q_ptr,
    scale_ptr,
    num_rows_ptr,
    max_rows,
    NUM_GROUPS: tl.constexpr,
    NUM_WALKERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    group = tl.program_id(0) % NUM_GROUPS
    expert = tl.program_id(1).to(tl.int64)
    num_rows = tl.load(num_rows_ptr + expert)
    begin = tl.program_id(0) // NUM_GROUPS * TILE_ROWS
    base = expert * max_rows
    for first_row in range(begin, num_rows, NUM_WALKERS * TILE_ROWS):
        _quantise_tile(
            x_ptr + base * (NUM_GROUPS * GROUP),
            q_ptr + base * (NUM_GROUPS * GROUP),
            scale_ptr + base * NUM_GROUPS,
            first_row, num_rows, group,
            NUM_GROUPS * GROUP, 1, max_rows, NUM_GROUPS, False, TILE_ROWS,
        )  # fmt: skip


@triton.jit
def _quantise_tile(
    x_ptr,
    q_ptr,
    scale_ptr,
    first_row,
    num_valid,
    group,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    NUM_GROUPS: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = first_row + tl.arange(0, TILE_ROWS)
    inside = (row < num_valid)[:, None]
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + column
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(x_at + NUM_GROUPS * GROUP, mask=inside, other=0.0).to(tl.float32)
        x = fp8_device.round_to_bf16(x / (1.0 + tl.exp(-x)) * up)
    scale, inverse = fp8_device.scale_of(tl.max(tl.abs(x), axis=1))
    q = fp8_device.to_fp8(x * inverse[:, None])
    q_at = q_ptr + row.to(tl.int64)[:, None] * (NUM_GROUPS * GROUP) + column
    # 8 values a thread in loads and stores alike: with 16 a load would take half sectors.
    tl.store(tl.max_contiguous(q_at, [1, 8]), q, mask=inside)
    scale_at = scale_ptr + row.to(tl.int64) * scale_row_stride + group * scale_group_stride
    tl.store(scale_at, scale, mask=row < num_valid)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_ue8m0(
    x_ptr,
    q_ptr,
    byte_ptr,
    num_rows,
    X_STRIDE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    group = tl.program_id(0) % NUM_GROUPS
    row = tl.program_id(0) // NUM_GROUPS * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (row < num_rows)[:, None]
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    x_at = x_ptr + row.to(tl.int64)[:, None] * X_STRIDE + column
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    # As integers magnitudes order alike, with Inf and then NaN above all.
    amax_bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    is_finite = amax_bits < fp8_device.EXPONENT_MASK
    amax = tl.where(is_finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale, _ = fp8_device.scale_of(amax)
    bits = scale.to(tl.int32, bitcast=True)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) > 0).to(tl.int32)
    factor = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    q = fp8_device.to_fp8(x * tl.where(is_finite, factor, float("nan"))[:, None])
    q_at = q_ptr + row.to(tl.int64)[:, None] * (NUM_GROUPS * GROUP) + column
    tl.store(tl.max_contiguous(q_at, [1, 8]), q, mask=inside)
    byte_at = byte_ptr + row.to(tl.int64) * ROW_BYTES + group
    tl.store(byte_at, tl.where(is_finite, byte, E8M0_NAN).to(tl.uint8), mask=row < num_rows)


def quantise_rows(
    x_TH: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs on the device of its tensors, no sync."""
    return _quantised(x_TH, num_rows_valid, column_major, is_gated=False)


def silu_mul_quantise(
    gate_up_TN: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs on the device of its tensors, no sync."""
    return _quantised(gate_up_TN, num_rows_valid, column_major, is_gated=True)


def quantise_masked_rows(x_eMH: Tensor, num_rows_e: Tensor) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs on the device of its tensors, no sync."""
    num_experts, max_rows, num_groups = check_masked(x_eMH, num_rows_e)
    x_eMH = x_eMH.contiguous()
    q_eMH = torch.empty(x_eMH.shape, dtype=torch.float8_e4m3fn, device=x_eMH.device)
    scale_eMG = empty_masked_scales(num_experts, max_rows, num_groups, x_eMH.device)
    num_walkers = min(MAX_WALKERS, triton.cdiv(max_rows, MASKED_TILE_ROWS))
    if q_eMH.numel():
        _launch_masked(
            (num_walkers * num_groups, num_experts, 1),
            variant_of(
                num_warps=NUM_WARPS,
                NUM_GROUPS=num_groups,
                NUM_WALKERS=num_walkers,
                TILE_ROWS=MASKED_TILE_ROWS,
            ),
            (x_eMH, q_eMH, scale_eMG, num_rows_e),
            (max_rows,),
        )
    return q_eMH, scale_eMG


def quantise_rows_ue8m0(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs on the device of its tensors, no sync."""
    num_rows, num_groups = check_rows(x_TH, fp8.GROUP)
    x_TH = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    q_TH = torch.empty(x_TH.shape, dtype=torch.float8_e4m3fn, device=x_TH.device)
    scale_TW = empty_words(num_rows, num_groups, x_TH.device)
    if q_TH.numel():
        _launch_ue8m0(
            (triton.cdiv(num_rows, TILE_ROWS) * num_groups, 1, 1),
            variant_of(
                num_warps=NUM_WARPS,
                X_STRIDE=x_TH.stride(0),
                NUM_GROUPS=num_groups,
                ROW_BYTES=4 * scale_TW.shape[1],
                TILE_ROWS=TILE_ROWS,
            ),
            (x_TH, q_TH, scale_TW.view(torch.uint8)),
            (num_rows,),
        )
    return q_TH, scale_TW


def _quantised(
    x_TH: Tensor, num_rows_valid: Tensor | None, column_major: bool, *, is_gated: bool
) -> tuple[Tensor, Tensor]:
    num_rows, num_groups = check_rows(x_TH, fp8.GROUP * (2 if is_gated else 1))
    x_TH = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    q_TH = torch.empty(
        num_rows, num_groups * fp8.GROUP, dtype=torch.float8_e4m3fn, device=x_TH.device
    )
    scale_TG = empty_scales(num_rows, num_groups, column_major=column_major, device=x_TH.device)
    num_programs = triton.cdiv(num_rows, TILE_ROWS) * num_groups
    if num_programs:
        _launch_rows(
            (num_programs, 1, 1),
            variant_of(
                num_warps=NUM_WARPS,
                X_STRIDE=x_TH.stride(0),
                NUM_GROUPS=num_groups,
                HAS_NUM_VALID=num_rows_valid is not None,
                IS_GATED=is_gated,
                TILE_ROWS=TILE_ROWS,
            ),
            (x_TH, q_TH, scale_TG, x_TH if num_rows_valid is None else num_rows_valid),
            (num_rows, scale_TG.stride(0), scale_TG.stride(1)),
        )
    return q_TH, scale_TG


_launch_rows = Launcher(_quantise)
_launch_masked, _launch_ue8m0 = Launcher(_quantise_masked), Launcher(_quantise_ue8m0)
