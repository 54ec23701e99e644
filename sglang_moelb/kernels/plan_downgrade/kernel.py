"""Triton kernel of `plan_downgrade`: one program a rank sums the counts and decides on its experts.

Example: two ranks of two experts, capacity factor 1, vision share 0.5, Form.FEWEST, low cost 0.5:

    expert   rows   vision   rank: load, vision share     time if lowered so far
    0          40       10   0: 100, 0.6 > 0.5            100 > 60, the mean
    1          60       50   hot (100 > 60), vision       expert 1 first: 60 / 2 + 40 = 70 > 60
    2          20       20   1: 20, not hot               expert 0 is not vision: it stays
    3           0        0

    low = [0, 1, 0, 0]

Had expert 1 refused rows as well, nothing would be lowered: expert 0 is still not vision.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.launch import Launcher, Variant, variant_of
from sglang_moelb.kernels.plan_downgrade import ref
from sglang_moelb.types import Form

TILE = 2048  # counts that a program has in registers at a time

NUM_COUNTS = tl.constexpr(row_layout.NUM_COUNTS)
NUM_HEADER = tl.constexpr(row_layout.NUM_HEADER)
C_TEXT_ROWS = tl.constexpr(row_layout.C_TEXT_ROWS)
C_VISION_ROWS = tl.constexpr(row_layout.C_VISION_ROWS)
C_REFUSED_ROWS = tl.constexpr(row_layout.C_REFUSED_ROWS)
ONE = tl.constexpr(ref.ONE)
RANK = tl.constexpr(int(Form.RANK))
EXPERTS = tl.constexpr(int(Form.EXPERTS))
FEWEST = tl.constexpr(int(Form.FEWEST))


@triton.jit
def _at(counts_ptr, row, row_stride, expert):
    return counts_ptr + row.to(tl.int64) * row_stride + NUM_HEADER + expert * NUM_COUNTS


@triton.jit
def _load(at, inside):
    """Text and vision rows as int64."""
    text = tl.load(at + C_TEXT_ROWS, mask=inside, other=0).to(tl.int64)
    return text, tl.load(at + C_VISION_ROWS, mask=inside, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["row_stride", "capacity", "share", "saved"])
def _plan(
    counts_ptr,
    low_ptr,
    row_stride,
    capacity,
    share,
    saved,
    FORM: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
):
    size: tl.constexpr = NUM_EXPERTS // NUM_RANKS
    parts = tl.zeros([TILE], tl.int64)
    for start in range(0, NUM_RANKS * NUM_EXPERTS, TILE):
        item = start + tl.arange(0, TILE)
        at = _at(counts_ptr, item // NUM_EXPERTS, row_stride, item % NUM_EXPERTS)
        text, vision = _load(at, item < NUM_RANKS * NUM_EXPERTS)
        parts += text + vision
    total = tl.sum(parts, axis=0)

    place = tl.arange(0, TILE_EXPERTS)
    expert = tl.program_id(0) * size + place
    rows_e = tl.zeros([TILE_EXPERTS], tl.int64)
    vision_e = tl.zeros([TILE_EXPERTS], tl.int64)
    refused_e = tl.zeros([TILE_EXPERTS], tl.int32)
    for start in range(0, NUM_RANKS, TILE_RANKS):
        source = start + tl.arange(0, TILE_RANKS)[:, None]
        at = _at(counts_ptr, source, row_stride, expert[None, :])
        inside = (source < NUM_RANKS) & (place < size)[None, :]
        text, vision = _load(at, inside)
        refused = tl.load(at + C_REFUSED_ROWS, mask=inside, other=0)
        rows_e += tl.sum(text + vision, axis=0)
        vision_e += tl.sum(vision, axis=0)
        refused_e += tl.sum((refused != 0).to(tl.int32), axis=0)
    load = tl.sum(rows_e, axis=0)
    vision_load = tl.sum(vision_e, axis=0)

    is_hot = load * NUM_RANKS * ONE > capacity.to(tl.int64) * total
    is_vision = vision_load * ONE > share.to(tl.int64) * tl.maximum(load, 1)
    low = (place < size) & is_hot & is_vision
    if FORM == RANK:
        low = low & (tl.sum(refused_e, axis=0) == 0)
    else:
        low = low & (refused_e == 0)
        low = low & (vision_e * ONE > share.to(tl.int64) * tl.maximum(rows_e, 1))
    if FORM == EXPERTS:
        low = low & (rows_e * NUM_EXPERTS * ONE > capacity.to(tl.int64) * total)
    if FORM == FEWEST:
        candidates = tl.where(low, rows_e, 0)
        is_same = (candidates[None, :] == candidates[:, None]) & (place[None, :] < place[:, None])
        is_earlier = (candidates[None, :] > candidates[:, None]) | is_same
        earlier = tl.sum(tl.where(is_earlier, candidates[None, :], 0), axis=1)
        time = load * ONE - earlier * saved.to(tl.int64)
        low = low & (time * NUM_RANKS > total * ONE)
    tl.store(low_ptr + expert, low.to(tl.int32), mask=place < size)


def plan_downgrade(
    counts_RW: Tensor,
    *,
    num_experts: int,
    capacity_factor: float,
    vision_share: float,
    form: int,
    low_cost: float = 0.66,
) -> Tensor:
    """See `sglang_moelb.kernels.plan_downgrade`. Runs on the device of its tensors, no sync."""
    num_ranks = len(counts_RW)
    capacity, share, saved = ref.check_plan(
        num_ranks, num_experts, capacity_factor, vision_share, form, low_cost
    )
    counts_RW = counts_RW if counts_RW.stride(1) == 1 else counts_RW.contiguous()
    low_E = torch.empty(num_experts, dtype=torch.int32, device=counts_RW.device)
    _launch(
        (num_ranks, 1, 1),
        _variant(int(form), num_ranks, num_experts),
        (counts_RW, low_E),
        (counts_RW.stride(0), capacity, share, saved),
    )
    return low_E


@lru_cache(maxsize=64)
def _variant(form: int, num_ranks: int, num_experts: int) -> Variant:
    tile_experts = triton.next_power_of_2(num_experts // num_ranks)
    return variant_of(
        num_warps=8,
        FORM=form,
        NUM_RANKS=num_ranks,
        NUM_EXPERTS=num_experts,
        TILE=min(TILE, triton.next_power_of_2(num_ranks * num_experts)),
        TILE_EXPERTS=tile_experts,
        TILE_RANKS=min(max(1, TILE // tile_experts), triton.next_power_of_2(num_ranks)),
    )


_launch = Launcher(_plan)
