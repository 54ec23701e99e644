"""Triton kernel of `choose_copy`: one look-up a row.

Example: expert 0 has the copies 0 and 5, expert 1 the copy 1; shift 1, bounds 0:

    ids    [0, 1], [0, 1]    token 0 has turn 1, token 1 turn 2
    copies 5 (1 of 2) and 1 (of 1); 0 (2 mod 2) and 1
    out    [5, 1], [0, 1]

Shape letters: T tokens, K top-k, E experts, C most copies, B bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.choose_copy.ref import STEP, UNITS, check_choose

TILE = 1024


@triton.jit(do_not_specialize=["num_rows", "ids_stride", "shift"])
def _choose(
    ids_ptr,
    copies_ptr,
    num_copies_ptr,
    bounds_ptr,
    out_ptr,
    num_rows,
    ids_stride,
    shift,
    TOPK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    MAX_COPIES: tl.constexpr,
    NUM_BOUNDS: tl.constexpr,
    STEP: tl.constexpr,
    UNITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = row < num_rows
    token = row // TOPK
    ids = tl.load(ids_ptr + token * ids_stride + row % TOPK, mask=inside, other=-1)
    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    expert = tl.where(valid, ids, 0).to(tl.int32)
    num_copies = tl.load(num_copies_ptr + expert)
    by_turn = ((token + shift) % num_copies).to(tl.int32)
    position = ((token + shift) * STEP % UNITS).to(tl.int32)
    first = tl.load(bounds_ptr + expert * NUM_BOUNDS)
    by_share = (first <= position).to(tl.int32)
    for bound in tl.static_range(1, NUM_BOUNDS):
        by_share += (tl.load(bounds_ptr + expert * NUM_BOUNDS + bound) <= position).to(tl.int32)
    turn = tl.where(first == 0, by_turn, by_share)
    physical = tl.load(copies_ptr + expert * MAX_COPIES + turn)
    out = tl.where(valid, physical, -1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row, out, mask=inside)


def choose_copy(
    ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, bounds_EB: Tensor, *, shift: int
) -> Tensor:
    """See `sglang_moelb.kernels.choose_copy`. Runs on the device of its tensors, no sync."""
    check_choose(ids_TK, copies_EC, num_copies_E, bounds_EB, shift)
    out_TK = torch.empty(ids_TK.shape, dtype=ids_TK.dtype, device=ids_TK.device)
    num_rows = out_TK.numel()
    if num_rows == 0:
        return out_TK
    if ids_TK.stride(1) != 1:
        ids_TK = ids_TK.contiguous()
    _choose[(triton.cdiv(num_rows, TILE),)](
        ids_TK,
        copies_EC.contiguous(),
        num_copies_E.contiguous(),
        bounds_EB.contiguous(),
        out_TK,
        num_rows,
        ids_TK.stride(0),
        shift,
        TOPK=ids_TK.shape[1],
        NUM_EXPERTS=len(copies_EC),
        MAX_COPIES=copies_EC.shape[1],
        NUM_BOUNDS=bounds_EB.shape[1],
        STEP=STEP,
        UNITS=UNITS,
        TILE_ROWS=TILE,
    )
    return out_TK
