"""Triton kernel of `join_rows`: a few programs walk over the rows of each expert.

Example: first has one expert of 2 rows, second one of 1 row, room for 3, 2 programs an expert:

    expert 0: program 0 copies first's row 0, program 1 its row 1
    expert 1: program 0 copies second's row 0, program 1 finds nothing

Shape letters: e experts of both, a of the first, b of the second, M rows of room, H features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.join_rows.ref import check_join

NUM_WALKERS = 8
MAX_BLOCK = 2048
NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["num_first", "max_rows"],
    do_not_specialize_on_alignment=["num_rows_ptr"],
)
def _join(
    first_ptr,
    second_ptr,
    out_ptr,
    num_rows_ptr,
    num_first,
    max_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_WALKERS: tl.constexpr,
):
    expert = tl.program_id(1)
    num_rows = tl.load(num_rows_ptr + expert)
    base = expert.to(tl.int64) * max_rows
    is_first = expert < num_first
    for row in range(tl.program_id(0), num_rows, NUM_WALKERS):
        to_at = (base + row) * WIDTH
        second_at = (base - num_first.to(tl.int64) * max_rows + row) * WIDTH
        for begin in tl.static_range(0, WIDTH, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < WIDTH
            if is_first:
                value = tl.load(first_ptr + to_at + column, mask=inside)
            else:
                value = tl.load(second_ptr + second_at + column, mask=inside)
            tl.store(out_ptr + to_at + column, value, mask=inside)


def join_rows(first_aMH: Tensor, second_bMH: Tensor, num_rows_e: Tensor) -> Tensor:
    """See `sglang_moelb.kernels.join_rows`. Runs on the device of its tensors, no sync."""
    check_join(first_aMH, second_bMH, num_rows_e)
    num_experts, (max_rows, width) = len(num_rows_e), first_aMH.shape[1:]
    out_eMH = torch.empty(
        num_experts, max_rows, width, dtype=first_aMH.dtype, device=first_aMH.device
    )
    if out_eMH.numel():
        _join[(NUM_WALKERS, num_experts)](
            first_aMH,
            second_bMH,
            out_eMH,
            num_rows_e,
            len(first_aMH),
            max_rows,
            WIDTH=width,
            BLOCK=min(triton.next_power_of_2(width), MAX_BLOCK),
            NUM_WALKERS=NUM_WALKERS,
            num_warps=NUM_WARPS,
        )
    return out_eMH
