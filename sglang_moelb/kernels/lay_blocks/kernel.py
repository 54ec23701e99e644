"""Triton kernel of `lay_blocks`: a program for each block sums the blocks of all experts.

Example: two experts of 9 and 1 rows with room for 16 each, in blocks of 8, program 1:

    blocks of the experts 2, 1; they end at 2, 3; none has ended at 1, so its expert is 0
    it is that expert's block 1 - 0, so its rows are 8 to 15, of which 9 is beyond its 9 rows
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.lay_blocks.ref import Blocks, check_blocks

LANES = 64  # at least the largest block
NUM_WARPS = 2


@triton.jit(
    do_not_specialize=["num_rows", "room", "block"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def _lay(
    counts_ptr,
    rows_ptr,
    experts_ptr,
    used_ptr,
    num_rows,
    room,
    block,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
):
    at = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < NUM_EXPERTS, other=0)
    blocks = (counts + block - 1) // block
    ends = tl.cumsum(blocks, axis=0)
    own = tl.sum((ends <= at).to(tl.int32), axis=0)
    count = tl.sum(tl.where(expert == own, counts, 0), axis=0)
    first_block = tl.sum(tl.where(expert == own, ends - blocks, 0), axis=0)
    followed = tl.sum(tl.where(expert < own, counts, 0), axis=0)
    begin = tl.where(room > 0, own * room, followed)
    lane = tl.arange(0, LANES)
    row = (at - first_block) * block + lane
    row = tl.where(row < count, begin + row, num_rows)
    tl.store(rows_ptr + at * block + lane, row, mask=lane < block)
    tl.store(experts_ptr + at, tl.minimum(own, NUM_EXPERTS - 1))
    if at == 0:
        tl.store(used_ptr, tl.sum(blocks, axis=0) * block)
        tl.store(used_ptr + 1, 0)


def lay_blocks(num_rows_e: Tensor, *, num_rows: int, room: int, block: int) -> Blocks:
    """See `sglang_moelb.kernels.lay_blocks`. Runs on the device of its tensor, no sync."""
    num_blocks = check_blocks(num_rows_e, num_rows=num_rows, room=room, block=block)
    rows, experts, used = (
        torch.empty(size, dtype=torch.int32, device=num_rows_e.device)
        for size in (num_blocks * block, num_blocks, 2)
    )
    num_experts = len(num_rows_e)
    _lay[(num_blocks,)](
        num_rows_e,
        rows,
        experts,
        used,
        num_rows,
        room,
        block,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        LANES=LANES,
        num_warps=NUM_WARPS,
    )
    return Blocks(rows=rows, experts=experts, used=used)
