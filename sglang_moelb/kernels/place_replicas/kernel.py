"""Triton kernel of `place_replicas`: one program, one column a limit, one copy a step.

A column has the ranks' room and the exporter's experts as sortable keys, so that a step is two
maxima and a few selects; a column stays inside a warp, so that steps take no barrier. The copies of
all limits are written down as they are made, and those of the best one become the plan. Steps are
about as many as copies: 25 at 4 ranks and 80 at 64.

Example: two ranks of two experts with 50, 30 and 10, 10 rows, one slot a rank, the limit 50:

    keys of room       rank 1 has 30 below the limit and a free slot
    keys of the rest   of rank 0, which must lose 30: expert 0 has 50, expert 1 has 30
    step               30 rows of expert 0 to rank 1, slot 0; nobody must lose more

    slots [[-1], [0]], quotas [[20, 30], [30, 0], [0, 10], [0, 10]], times 80 and 50

Shape letters: R ranks, W row width, E experts, S slots of a rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.launch import Launcher, Variant, variant_of
from sglang_moelb.kernels.place_replicas.ref import NUM_LIMITS, check_place

STEPS_A_CHECK = 4  # whether a limit still runs is a maximum over lanes, as dear as a step
SOURCE_ENTRIES = 1024  # counts of source ranks that a warp has in registers at a time
WRITE_ENTRIES = 1024
WORDS_A_COPY = 2
MIN_WARPS, MAX_WARPS = 4, 16

LIMITS = tl.constexpr(NUM_LIMITS)
CHECK = tl.constexpr(STEPS_A_CHECK)
WORDS = tl.constexpr(WORDS_A_COPY)
NUM_COUNTS = tl.constexpr(row_layout.NUM_COUNTS)
NUM_HEADER = tl.constexpr(row_layout.NUM_HEADER)
C_TEXT_ROWS = tl.constexpr(row_layout.C_TEXT_ROWS)
C_VISION_ROWS = tl.constexpr(row_layout.C_VISION_ROWS)
# Keys: rows above free slots above the rank from the back; rows above the expert from the back.
RANK_BITS = tl.constexpr(8)
LAST_RANK = tl.constexpr(255)
SLOT_BITS = tl.constexpr(8)
SLOT_MASK = tl.constexpr(255)
LOCAL_BITS = tl.constexpr(10)
LAST_LOCAL = tl.constexpr(1023)


@triton.jit
def _load_rows(
    rows_ptr,
    row_stride,
    expert,
    is_expert,
    NUM_RANKS: tl.constexpr,
    TILE_SOURCES: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
):
    load = tl.zeros([TILE_EXPERTS], tl.int32)
    for start in range(0, NUM_RANKS, TILE_SOURCES):
        source = start + tl.arange(0, TILE_SOURCES)
        at = rows_ptr + source.to(tl.int64)[:, None] * row_stride
        at += NUM_HEADER + expert[None, :] * NUM_COUNTS
        inside = (source < NUM_RANKS)[:, None] & is_expert[None, :]
        text = tl.load(at + C_TEXT_ROWS, mask=inside, other=0)
        vision = tl.load(at + C_VISION_ROWS, mask=inside, other=0)
        load += tl.sum(text + vision, axis=0)
    return load


@triton.jit
def _room_key(room, free, rank):
    key = (room << SLOT_BITS) + free
    key = (key << RANK_BITS) + (LAST_RANK - rank)
    return tl.where((room > 0) & (free > 0), key, 0)


@triton.jit
def _step(
    room_key,
    rest_key,
    need,
    missed,
    source,
    running,
    limit,
    sorted_ptr,
    source_loads_ptr,
    source_ranks_ptr,
    copies_ptr,
    send,
    receive,
    least,
    NUM_RANKS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_LOCAL: tl.constexpr,
):
    home = tl.load(source_ranks_ptr + tl.minimum(source, TILE_RANKS - 1))
    room_top = tl.max(room_key, axis=0)
    rest_top = tl.max(rest_key, axis=0)
    to = LAST_RANK - (room_top & LAST_RANK)
    free = (room_top >> RANK_BITS) & SLOT_MASK
    room = (room_top >> (RANK_BITS + SLOT_BITS)) - receive
    rest = rest_top >> LOCAL_BITS
    local = LAST_LOCAL - (rest_top & LAST_LOCAL)
    full = running & (room < least)
    copy = running & (room >= least) & (rest >= least)
    rows = tl.maximum(tl.minimum(tl.minimum(need + send, rest), room), least)
    rows = tl.where(copy, rows, 0)
    word = ((home * NUM_LOCAL + local) << (RANK_BITS + SLOT_BITS)) + (to << SLOT_BITS)
    word = (word + (NUM_SLOTS - free)).to(tl.int32)
    ranks = tl.arange(0, TILE_RANKS)[:, None]
    locals_ = tl.arange(0, TILE_LOCAL)[:, None]
    # Written by the lane with the first expert: a tensor of the keys' shape stays in their layout.
    at = copies_ptr + tl.arange(0, LIMITS)[None, :] * (WORDS * TILE_LOCAL) + locals_
    tl.store(at, word[None, :], mask=locals_ == 0)
    tl.store(at + TILE_LOCAL, rows.to(tl.int32)[None, :], mask=locals_ == 0)

    at_rank = copy[None, :] & (ranks == to[None, :])
    room_key = tl.where(at_rank, _room_key(room - rows, free - 1, to)[None, :], room_key)
    rest_left = rest_top - (rows << LOCAL_BITS)
    rest_key = tl.where(locals_ == local[None, :], rest_left[None, :], rest_key)
    need -= tl.where(copy, rows - send, 0)

    done = running & ((copy == 0) | (need <= 0))
    missed = tl.where(done, tl.maximum(missed, need), missed)
    source += done.to(tl.int32)
    is_source = done & (source < NUM_RANKS)
    load = tl.load(source_loads_ptr + source, mask=is_source, other=0).to(tl.int64)
    need = tl.where(done, tl.where(is_source, load - limit, 0), need)
    new_rest = tl.load(
        sorted_ptr + source[None, :] * TILE_LOCAL + locals_, mask=is_source[None, :], other=0
    )
    new_key = (new_rest.to(tl.int64) << LOCAL_BITS) + (LAST_LOCAL - locals_)
    rest_key = tl.where(done[None, :], new_key, rest_key)
    # Of the sources that a full machine leaves, the next one misses most.
    missed = tl.where(full, tl.maximum(missed, need), missed)
    running = running & (full == 0) & (need > 0)
    return room_key, rest_key, need, missed, source, running


@triton.jit
def _write_plan(
    copies_ptr,
    loads_ptr,
    slots_ptr,
    quota_ptr,
    num_steps,
    best,
    NUM_RANKS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_LOCAL: tl.constexpr,
    TILE: tl.constexpr,
):
    for start in range(0, NUM_RANKS * NUM_SLOTS, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(slots_ptr + at, -1, mask=at < NUM_RANKS * NUM_SLOTS)
    num_quotas = NUM_RANKS * NUM_LOCAL * NUM_RANKS
    for start in range(0, num_quotas, TILE):
        at = start + tl.arange(0, TILE)
        expert = at // NUM_RANKS
        is_home = (at < num_quotas) & (at % NUM_RANKS == expert // NUM_LOCAL)
        load = tl.load(loads_ptr + expert, mask=is_home, other=0)
        tl.store(quota_ptr + at, load, mask=at < num_quotas)
    tl.debug_barrier()
    for start in range(0, num_steps, LIMITS):
        step = start + tl.arange(0, LIMITS)
        at = copies_ptr + (step * LIMITS + best) * (WORDS * TILE_LOCAL)
        word = tl.load(at, mask=step < num_steps, other=0)
        rows = tl.load(at + TILE_LOCAL, mask=step < num_steps, other=0)
        expert = word >> (RANK_BITS + SLOT_BITS)
        rank = (word >> SLOT_BITS) & LAST_RANK
        copy = rows > 0
        tl.store(slots_ptr + rank * NUM_SLOTS + (word & SLOT_MASK), expert, mask=copy)
        tl.store(quota_ptr + expert * NUM_RANKS + rank, rows, mask=copy)
        at_home = quota_ptr + expert * NUM_RANKS + expert // NUM_LOCAL
        tl.atomic_add(at_home, -rows, mask=copy, sem="relaxed")


@triton.jit(do_not_specialize=["row_stride", "send", "receive", "least"])
def _place(
    rows_ptr,
    scratch_ptr,
    slots_ptr,
    quota_ptr,
    times_ptr,
    row_stride,
    send,
    receive,
    least,
    NUM_RANKS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_LOCAL: tl.constexpr,
    TILE_SOURCES: tl.constexpr,
    TILE_WRITE: tl.constexpr,
):
    sorted_ptr = scratch_ptr  # rows of the experts, busiest rank first
    loads_ptr = sorted_ptr + TILE_RANKS * TILE_LOCAL  # rows of the experts
    source_loads_ptr = loads_ptr + TILE_RANKS * TILE_LOCAL
    source_ranks_ptr = source_loads_ptr + TILE_RANKS
    copies_ptr = source_ranks_ptr + TILE_RANKS

    place = tl.arange(0, TILE_RANKS * TILE_LOCAL)
    is_expert = (place // TILE_LOCAL < NUM_RANKS) & (place % TILE_LOCAL < NUM_LOCAL)
    expert = (place // TILE_LOCAL) * NUM_LOCAL + place % TILE_LOCAL
    load = _load_rows(
        rows_ptr,
        row_stride,
        expert,
        is_expert,
        NUM_RANKS,
        TILE_SOURCES,
        TILE_RANKS * TILE_LOCAL,
    )
    tl.store(loads_ptr + expert, load, mask=is_expert)
    by_rank = tl.reshape(load, [TILE_RANKS, TILE_LOCAL])
    rank_load = tl.sum(by_rank, axis=1)
    rank = tl.arange(0, TILE_RANKS)
    # Padding comes last: it has no rows and the highest index.
    ahead = rank_load[None, :] > rank_load[:, None]
    ahead = ahead | ((rank_load[None, :] == rank_load[:, None]) & (rank[None, :] < rank[:, None]))
    order = tl.sum(ahead.to(tl.int32), axis=1)
    tl.store(sorted_ptr + order[:, None] * TILE_LOCAL + tl.arange(0, TILE_LOCAL)[None, :], by_rank)
    tl.store(source_loads_ptr + order, rank_load)
    tl.store(source_ranks_ptr + order, rank)
    busiest = tl.max(rank_load).to(tl.int64)
    mean = (tl.sum(rank_load).to(tl.int64) + NUM_RANKS - 1) // NUM_RANKS
    tl.debug_barrier()

    column = tl.arange(0, LIMITS)
    below = LIMITS - 1 - column
    way = ((busiest - mean) * (4 - below % 2)) >> (2 + below // 2).to(tl.int64)
    limit = mean + tl.where(column == 0, 0, way)
    need = busiest - limit
    running = need > 0
    missed = tl.zeros([LIMITS], tl.int64)
    source = tl.zeros([LIMITS], tl.int32)
    locals_ = tl.arange(0, TILE_LOCAL)[:, None]
    first = tl.load(sorted_ptr + locals_ + source[None, :] * TILE_LOCAL).to(tl.int64)
    rest_key = (first << LOCAL_BITS) + (LAST_LOCAL - locals_)
    ranks = rank[:, None]
    room = tl.maximum(limit[None, :] - rank_load.to(tl.int64)[:, None], 0)
    room_key = _room_key(tl.where(ranks < NUM_RANKS, room, 0), NUM_SLOTS, ranks)

    num_steps = 0
    num_running = tl.max(running.to(tl.int32), axis=0)
    while num_running > 0:
        for _ in range(CHECK):
            room_key, rest_key, need, missed, source, running = _step(
                room_key,
                rest_key,
                need,
                missed,
                source,
                running,
                limit,
                sorted_ptr,
                source_loads_ptr,
                source_ranks_ptr,
                copies_ptr + num_steps * (WORDS * LIMITS * TILE_LOCAL),
                send,
                receive,
                least,
                NUM_RANKS,
                NUM_LOCAL,
                NUM_SLOTS,
                TILE_RANKS,
                TILE_LOCAL,
            )
            num_steps += 1
        num_running = tl.max(running.to(tl.int32), axis=0)

    # The lowest score wins, of equal ones the highest limit.
    score = (limit + missed) * LIMITS + (LIMITS - 1 - column)
    winner = tl.min(score, axis=0)
    best = LIMITS - 1 - (winner % LIMITS)
    tl.store(times_ptr, busiest)
    tl.store(times_ptr + 1, winner // LIMITS)
    tl.debug_barrier()
    _write_plan(
        copies_ptr,
        loads_ptr,
        slots_ptr,
        quota_ptr,
        num_steps,
        best,
        NUM_RANKS,
        NUM_LOCAL,
        NUM_SLOTS,
        TILE_LOCAL,
        TILE_WRITE,
    )


@lru_cache(maxsize=64)
def _sizes(num_ranks: int, num_experts: int, num_slots: int) -> tuple[Variant, int]:
    """The variant for these sizes, and how many words of scratch it takes."""
    num_local = num_experts // num_ranks
    tile_ranks = triton.next_power_of_2(num_ranks)
    tile_local = triton.next_power_of_2(num_local)
    max_steps = num_ranks * (num_slots + 1) + STEPS_A_CHECK
    copy_words = max_steps * NUM_LIMITS * WORDS_A_COPY * tile_local
    list_words = 2 * tile_ranks * (tile_local + 1)
    # So many that a thread has one column: four rows a thread are one load of 16 bytes.
    num_warps = min(MAX_WARPS, max(MIN_WARPS, tile_local // 4))
    tile_experts = tile_ranks * tile_local
    constants = {
        "NUM_RANKS": num_ranks,
        "NUM_LOCAL": num_local,
        "NUM_SLOTS": num_slots,
        "TILE_RANKS": tile_ranks,
        "TILE_LOCAL": tile_local,
        "TILE_SOURCES": max(1, min(tile_ranks, SOURCE_ENTRIES * num_warps // tile_experts)),
        "TILE_WRITE": WRITE_ENTRIES,
    }
    return variant_of(num_warps, **constants), list_words + copy_words


def place_replicas(
    rows_RW: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    send_rows: int = 0,
    receive_rows: int = 0,
    min_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sglang_moelb.kernels.place_replicas`. Runs on the device of its tensors, no sync."""
    check_place(rows_RW, num_experts, num_slots, (send_rows, receive_rows, min_rows))
    rows_RW = rows_RW if rows_RW.stride(1) == 1 else rows_RW.contiguous()
    num_ranks, device = rows_RW.shape[0], rows_RW.device
    variant, num_words = _sizes(num_ranks, num_experts, num_slots)
    scratch = torch.empty(num_words, dtype=torch.int32, device=device)
    slots_RS = torch.empty(num_ranks, num_slots, dtype=torch.int32, device=device)
    quota_ER = torch.empty(num_experts, num_ranks, dtype=torch.int32, device=device)
    times_2 = torch.empty(2, dtype=torch.int64, device=device)
    _launch(
        (1, 1, 1),
        variant,
        (rows_RW, scratch, slots_RS, quota_ER, times_2),
        (rows_RW.stride(0), send_rows, receive_rows, max(min_rows, send_rows + 1)),
    )
    return slots_RS, quota_ER, times_2


_launch = Launcher(_place)
