"""Triton kernel of `plan_cuts`: one program per group sums its histograms and finds the cut.

Example: one expert, two ranks, capacity 9, nothing protected:

    bin      rank 0   rank 1   sum from the top
    40         4        2        6
    20         6        3       15   > 9, so the cut bin is 20

    m = 9 - 6 = 3 amounts of bin 20 are left for n = 9: rank 0 gets 3*6//9 = 2, rank 1 gets
    3*9//9 - 2 = 1.

Shape letters: R ranks, W row width, G groups, B bins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.launch import Launcher, variant_of
from sglang_moelb.kernels.plan_cuts.ref import DIGIT_BITS, check_plan

TILE_ROWS = 64  # histograms of 64 bins that a program has in registers at a time

NUM_BINS = tl.constexpr(row_layout.NUM_BINS)
LAST_BIN = tl.constexpr(row_layout.NUM_BINS - 1)
NUM_COUNTS = tl.constexpr(row_layout.NUM_COUNTS)
NUM_HEADER = tl.constexpr(row_layout.NUM_HEADER)
C_PROTECTED_AMOUNT = tl.constexpr(row_layout.C_PROTECTED_AMOUNT)
DIGIT = tl.constexpr(DIGIT_BITS)
DIGIT_MASK = tl.constexpr((1 << DIGIT_BITS) - 1)


@triton.jit
def _share(amount, part, whole):
    high = amount * (part >> DIGIT)
    low = amount * (part & DIGIT_MASK)
    return ((high // whole) << DIGIT) + (((high % whole) << DIGIT) + low) // whole


@triton.jit(do_not_specialize=["row_stride", "my_rank"])
def _plan(
    rows_ptr,
    capacity_ptr,
    cut_bin_ptr,
    quota_ptr,
    row_stride,
    my_rank,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    group = tl.program_id(0)
    # Bins lie in descending order here, so that a running sum is a sum from the top.
    bins = LAST_BIN - tl.arange(0, NUM_BINS)
    total = tl.zeros([NUM_BINS], tl.int64)
    before = tl.zeros([NUM_BINS], tl.int64)
    mine = tl.zeros([NUM_BINS], tl.int64)
    protected = tl.zeros([TILE_ROWS], tl.int64)
    for start in range(0, NUM_RANKS * GROUP_SIZE, TILE_ROWS):
        item = start + tl.arange(0, TILE_ROWS)
        inside = item < NUM_RANKS * GROUP_SIZE
        rank = item // GROUP_SIZE
        expert = group * GROUP_SIZE + item % GROUP_SIZE
        row = rows_ptr + rank.to(tl.int64) * row_stride + NUM_HEADER
        amounts = tl.load(
            row[:, None] + NUM_EXPERTS * NUM_COUNTS + expert[:, None] * NUM_BINS + bins[None, :],
            mask=inside[:, None],
            other=0,
        ).to(tl.int64)
        total += tl.sum(amounts, axis=0)
        before += tl.sum(tl.where((rank < my_rank)[:, None], amounts, 0), axis=0)
        mine += tl.sum(tl.where((rank == my_rank)[:, None], amounts, 0), axis=0)
        protected += tl.load(
            row + expert * NUM_COUNTS + C_PROTECTED_AMOUNT, mask=inside, other=0
        ).to(tl.int64)

    room = tl.maximum(tl.load(capacity_ptr + group) - tl.sum(protected), 0)
    from_top = tl.cumsum(total, axis=0)
    cut_bin = tl.sum((from_top > room).to(tl.int32)) - 1
    at_cut = bins == cut_bin
    # Where nothing is cut no bin is at the cut: all sums below are 0, and so is the quota.
    whole = tl.sum(tl.where(at_cut, total, 0))
    left = tl.sum(tl.where(at_cut, room - (from_top - total), 0))
    part_before = tl.sum(tl.where(at_cut, before, 0))
    part_through = part_before + tl.sum(tl.where(at_cut, mine, 0))
    whole = tl.maximum(whole, 1)
    quota = _share(left, part_through, whole) - _share(left, part_before, whole)
    tl.store(cut_bin_ptr + group, cut_bin)
    tl.store(quota_ptr + group, quota.to(tl.int32))


def plan_cuts(
    rows_RW: Tensor, capacity_G: Tensor, *, my_rank: int, num_experts: int
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.plan_cuts`. Runs on the device of its tensors, no sync."""
    num_groups = capacity_G.numel()
    check_plan(rows_RW, num_groups, my_rank, num_experts)
    rows_RW = rows_RW if rows_RW.stride(1) == 1 else rows_RW.contiguous()
    cut_bin_G = torch.empty(num_groups, dtype=torch.int32, device=rows_RW.device)
    quota_G = torch.empty_like(cut_bin_G)
    variant = variant_of(
        num_warps=8,
        NUM_RANKS=rows_RW.shape[0],
        NUM_EXPERTS=num_experts,
        GROUP_SIZE=num_experts // num_groups,
        TILE_ROWS=TILE_ROWS,
    )
    _launch(
        (num_groups, 1, 1),
        variant,
        (rows_RW, capacity_G, cut_bin_G, quota_G),
        (rows_RW.stride(0), my_rank),
    )
    return cut_bin_G, quota_G


_launch = Launcher(_plan)
