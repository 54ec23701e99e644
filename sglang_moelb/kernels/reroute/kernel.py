"""Triton kernels of `reroute`: count tiles and deal, then find each row's position and its copy.

`_prepare` counts the experts of each tile of tokens; further programs of the same launch deal this
rank's rows to the ranks, as the position at which each rank's part ends, and look up where the
copies are. `_apply` sorts the rows of a tile by expert and place; a row's position is its place in
the sorted tile, less the rows of lower experts there, plus those of its own in the tiles before.
A plan without copies needs none of that: every program sees so in the slots and writes ids at home.

Example: rank 0 of 2, experts 0 and 1 on rank 0, one slot a rank, a copy of expert 0 in rank 1's;
rows of expert 0 by source [3, 1], quotas [2, 2]:

    deal       rank 0 keeps 2 of its 3 rows, the third goes to rank 1: parts end at [2, 3]
    places     2 own experts and a slot a rank: expert 0 is physical 0 on rank 0, 5 on rank 1
    ids        [0], [1], [0], [0] become [0], [1], [0], [5]

Shape letters: T tokens, K top-k, R ranks, W row width, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.launch import Launcher, Variant, variant_of
from sglang_moelb.kernels.reroute.ref import check_reroute

DEAL_ENTRIES = 2048
COUNT_ENTRIES = 4096
MIN_TILE_EXPERTS = 32  # a warp's worth of bins, below which tl.histogram is not exercised upstream
TILE_ROWS = 1024
MANY_TOKENS = 8192  # below which smaller tiles fill the device better
MAX_PLAN_ENTRIES = 1024  # slots of all ranks that each program looks through for a copy

NUM_COUNTS = tl.constexpr(row_layout.NUM_COUNTS)
NUM_HEADER = tl.constexpr(row_layout.NUM_HEADER)
C_TEXT_ROWS = tl.constexpr(row_layout.C_TEXT_ROWS)
C_VISION_ROWS = tl.constexpr(row_layout.C_VISION_ROWS)


@triton.jit
def _deal(
    first,
    rows_ptr,
    slots_ptr,
    quota_ptr,
    ends_ptr,
    physical_ptr,
    row_stride,
    my_rank,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_DEAL: tl.constexpr,
):
    expert = (first + tl.arange(0, TILE_DEAL))[:, None]
    rank = tl.arange(0, TILE_RANKS)[None, :]
    inside = (expert < NUM_EXPERTS) & (rank < NUM_RANKS)
    at = rows_ptr + rank.to(tl.int64) * row_stride + NUM_HEADER + expert * NUM_COUNTS
    rows = tl.load(at + C_TEXT_ROWS, mask=inside, other=0)
    rows += tl.load(at + C_VISION_ROWS, mask=inside, other=0)
    quota = tl.load(quota_ptr + expert * NUM_RANKS + rank, mask=inside, other=0)
    local = tl.minimum(rows, quota)
    left = rows - local
    start = tl.sum(tl.where(rank < my_rank, left, 0), axis=1)[:, None]
    end = start + tl.sum(tl.where(rank == my_rank, left, 0), axis=1)[:, None]
    room = quota - local
    room_end = tl.cumsum(room, axis=1)
    share = tl.minimum(end, room_end) - tl.maximum(start, room_end - room)
    share = tl.maximum(share, 0) + tl.where(rank == my_rank, local, 0)

    num_local: tl.constexpr = NUM_EXPERTS // NUM_RANKS
    place = expert % num_local + tl.zeros_like(share)
    for slot in range(NUM_SLOTS):
        held = tl.load(slots_ptr + rank * NUM_SLOTS + slot, mask=rank < NUM_RANKS, other=-1)
        place = tl.where(held == expert, num_local + slot, place)
    out = expert * TILE_RANKS + rank
    is_expert = (expert < NUM_EXPERTS) & (rank < TILE_RANKS)
    tl.store(ends_ptr + out, tl.cumsum(share, axis=1), mask=is_expert)
    tl.store(physical_ptr + out, rank * (num_local + NUM_SLOTS) + place, mask=is_expert)


@triton.jit
def _parts(scratch_ptr, NUM_ENTRIES: tl.constexpr):
    """Where the deal is, ends and physical ids, and behind it the counts of the tiles."""
    return scratch_ptr, scratch_ptr + NUM_ENTRIES, scratch_ptr + 2 * NUM_ENTRIES


@triton.jit
def _has_copies(slots_ptr, NUM_ENTRIES: tl.constexpr, TILE_PLAN: tl.constexpr):
    entry = tl.arange(0, TILE_PLAN)
    held = tl.load(slots_ptr + entry, mask=entry < NUM_ENTRIES, other=-1)
    return tl.max(held, axis=0) >= 0


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "ids_stride", "row_stride", "my_rank"])
def _prepare(
    ids_ptr,
    rows_ptr,
    slots_ptr,
    quota_ptr,
    scratch_ptr,
    num_tokens,
    num_tiles,
    ids_stride,
    row_stride,
    my_rank,
    TOPK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_TOPK: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_DEAL: tl.constexpr,
    TILE_PLAN: tl.constexpr,
):
    ends_ptr, physical_ptr, counts_ptr = _parts(scratch_ptr, NUM_EXPERTS * TILE_RANKS)
    tile = tl.program_id(0)
    copies = True
    if TILE_PLAN > 0:
        copies = _has_copies(slots_ptr, NUM_RANKS * NUM_SLOTS, TILE_PLAN)
    if (tile < num_tiles) & copies:
        token = tile.to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        column = tl.arange(0, TILE_TOPK)[None, :]
        inside = (token < num_tokens)[:, None] & (column < TOPK)
        ids = tl.load(ids_ptr + token[:, None] * ids_stride + column, mask=inside, other=-1)
        ids = tl.reshape(ids.to(tl.int32), [TILE_TOKENS * TILE_TOPK])
        valid = (ids >= 0) & (ids < NUM_EXPERTS)
        counts = tl.histogram(tl.where(valid, ids, 0), TILE_EXPERTS, mask=valid)
        tl.store(counts_ptr + tile * TILE_EXPERTS + tl.arange(0, TILE_EXPERTS), counts)
    elif copies:
        _deal(
            (tile - num_tiles) * TILE_DEAL,
            rows_ptr,
            slots_ptr,
            quota_ptr,
            ends_ptr,
            physical_ptr,
            row_stride,
            my_rank,
            NUM_RANKS,
            NUM_EXPERTS,
            NUM_SLOTS,
            TILE_RANKS,
            TILE_DEAL,
        )


@triton.jit
def _bit(j: tl.constexpr, BITS: tl.constexpr):
    """Bit j of the index, as a tensor that broadcasts over a cube of BITS axes of 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - 1 - j) + [2] + [1] * j)


@triton.jit
def _sort(keys, BITS: tl.constexpr):
    """Ascending bitonic sort of 2**BITS keys below 2**30.

    `tl.sort` finds a partner by an exclusive or over pairs, which Triton's interpreter computes in
    Python number by number; a sum over pairs less the own key is the same and is fast there too.
    """
    cube = tl.reshape(keys, [2] * BITS)
    for stage in tl.static_range(1, BITS + 1):
        for step in tl.static_range(stage):
            partner = tl.sum(cube, axis=BITS - stage + step, keep_dims=True) - cube
            takes_larger = _bit(stage - 1 - step, BITS)
            if stage < BITS:
                takes_larger ^= _bit(stage, BITS)
            larger = tl.maximum(cube, partner)
            cube = tl.where(takes_larger != 0, larger, tl.minimum(cube, partner))
    return tl.reshape(cube, [2**BITS])


@triton.jit
def _first_positions(counts_ptr, tile, TILE_EXPERTS: tl.constexpr, TILE_COUNTS: tl.constexpr):
    """Position of each expert's first row of a tile, less the tile's rows of lower experts."""
    experts = tl.arange(0, TILE_EXPERTS)
    before = tl.zeros([TILE_EXPERTS], tl.int32)
    for start in range(0, tile, TILE_COUNTS):
        earlier = (start + tl.arange(0, TILE_COUNTS))[:, None]
        at = counts_ptr + earlier * TILE_EXPERTS + experts[None, :]
        before += tl.sum(tl.load(at, mask=earlier < tile, other=0), axis=0)
    counts = tl.load(counts_ptr + tile * TILE_EXPERTS + experts)
    return before - (tl.cumsum(counts, axis=0) - counts)


@triton.jit(do_not_specialize=["num_tokens", "ids_stride"])
def _apply(
    ids_ptr,
    slots_ptr,
    scratch_ptr,
    out_ptr,
    num_tokens,
    ids_stride,
    TOPK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_TOPK: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COUNTS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    ENTRY_BITS: tl.constexpr,
    TILE_PLAN: tl.constexpr,
):
    ends_ptr, physical_ptr, counts_ptr = _parts(scratch_ptr, NUM_EXPERTS * TILE_RANKS)
    id_type: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    copies = True
    if TILE_PLAN > 0:
        copies = _has_copies(slots_ptr, NUM_RANKS * NUM_SLOTS, TILE_PLAN)
    place = tl.arange(0, TILE_TOKENS * TILE_TOPK)
    token = tile.to(tl.int64) * TILE_TOKENS + place // TILE_TOPK
    column = place % TILE_TOPK
    inside = (token < num_tokens) & (column < TOPK)
    ids = tl.load(ids_ptr + token * ids_stride + column, mask=inside, other=-1)
    expert = tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, TILE_EXPERTS).to(tl.int32)
    if copies:
        key = _sort(expert * (TILE_TOKENS * TILE_TOPK) + place, ENTRY_BITS)

        expert = key // (TILE_TOKENS * TILE_TOPK)
        valid = expert < NUM_EXPERTS
        expert = tl.where(valid, expert, 0)
        first_positions = _first_positions(counts_ptr, tile, TILE_EXPERTS, TILE_COUNTS)
        position = place + tl.gather(first_positions, expert, axis=0)
        first = expert * TILE_RANKS
        rank = tl.zeros_like(expert)
        for step in tl.static_range(SEARCH_STEPS):
            end_at = ends_ptr + first + rank + ((TILE_RANKS >> (step + 1)) - 1)
            end = tl.load(end_at, mask=valid, other=0)
            rank += tl.where(position >= end, TILE_RANKS >> (step + 1), 0)
        physical = tl.load(physical_ptr + first + rank, mask=valid, other=-1)

        place = key % (TILE_TOKENS * TILE_TOPK)
        token = tile.to(tl.int64) * TILE_TOKENS + place // TILE_TOPK
        column = place % TILE_TOPK
        inside = (token < num_tokens) & (column < TOPK)
        tl.store(out_ptr + token * TOPK + column, physical.to(id_type), mask=inside)
    else:
        num_local: tl.constexpr = NUM_EXPERTS // NUM_RANKS
        physical = expert + (expert // num_local) * NUM_SLOTS
        physical = tl.where(expert < NUM_EXPERTS, physical, -1)
        tl.store(out_ptr + token * TOPK + column, physical.to(id_type), mask=inside)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Variants of both kernels, and what the launch and the scratch follow from."""

    prepare: Variant
    apply: Variant
    tile_tokens: int
    num_deals: int
    words_of_deal: int
    words_a_tile: int


@lru_cache(maxsize=64)
def _sizes(topk: int, num_ranks: int, num_experts: int, num_slots: int, *, many: bool) -> _Sizes:
    tile_experts = max(MIN_TILE_EXPERTS, triton.next_power_of_2(num_experts))
    tile_ranks = triton.next_power_of_2(num_ranks)
    tile_topk = triton.next_power_of_2(topk)
    tile_tokens = max(1, (TILE_ROWS if many else TILE_ROWS // 2) // tile_topk)
    tile_deal = max(1, min(tile_experts, DEAL_ENTRIES // tile_ranks))
    num_entries = num_ranks * num_slots
    has_few = 0 < num_entries <= MAX_PLAN_ENTRIES
    common = {
        "TOPK": topk,
        "NUM_RANKS": num_ranks,
        "NUM_EXPERTS": num_experts,
        "NUM_SLOTS": num_slots,
        "TILE_PLAN": triton.next_power_of_2(num_entries) if has_few else 0,
        "TILE_TOKENS": tile_tokens,
        "TILE_TOPK": tile_topk,
        "TILE_EXPERTS": tile_experts,
        "TILE_RANKS": tile_ranks,
    }
    of_apply = {
        "TILE_COUNTS": max(1, COUNT_ENTRIES // tile_experts),
        "SEARCH_STEPS": tile_ranks.bit_length() - 1,
        "ENTRY_BITS": (tile_tokens * tile_topk).bit_length() - 1,
    }
    return _Sizes(
        prepare=variant_of(num_warps=4, **common, TILE_DEAL=tile_deal),
        apply=variant_of(num_warps=8, **common, **of_apply),
        tile_tokens=tile_tokens,
        num_deals=-(-num_experts // tile_deal),
        words_of_deal=2 * num_experts * tile_ranks,
        words_a_tile=tile_experts,
    )


def reroute(
    ids_TK: Tensor,
    rows_RW: Tensor,
    slots_RS: Tensor,
    quota_ER: Tensor,
    *,
    my_rank: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `sglang_moelb.kernels.reroute`. Runs on the device of its tensors, no sync."""
    check_reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank)
    num_tokens, topk = ids_TK.shape
    out_TK = torch.empty_like(ids_TK, dtype=dtype, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out_TK
    ids_TK = ids_TK if ids_TK.stride(1) == 1 else ids_TK.contiguous()
    rows_RW = rows_RW if rows_RW.stride(1) == 1 else rows_RW.contiguous()
    slots_RS, quota_ER = slots_RS.contiguous(), quota_ER.contiguous()
    num_experts, num_ranks = quota_ER.shape
    many = num_tokens > MANY_TOKENS
    sizes = _sizes(topk, num_ranks, num_experts, slots_RS.shape[1], many=many)
    num_tiles = -(-num_tokens // sizes.tile_tokens)
    num_words = sizes.words_of_deal + num_tiles * sizes.words_a_tile
    scratch = torch.empty(num_words, dtype=torch.int32, device=ids_TK.device)
    stride = ids_TK.stride(0)
    _launch_prepare(
        (num_tiles + sizes.num_deals, 1, 1),
        sizes.prepare,
        (ids_TK, rows_RW, slots_RS, quota_ER, scratch),
        (num_tokens, num_tiles, stride, rows_RW.stride(0), my_rank),
    )
    _launch_apply(
        (num_tiles, 1, 1),
        sizes.apply,
        (ids_TK, slots_RS, scratch, out_TK),
        (num_tokens, stride),
    )
    return out_TK


_launch_prepare, _launch_apply = Launcher(_prepare), Launcher(_apply)
