"""Triton kernels of `cut_tokens`: mark, find the cut of each group, apply.

Only rows of a cut bin wait for a decision. `_mark` decides all others, packs the waiting ones as
group and key, and sums their amounts by group and by the low bits of the key. `_find` walks those
sums to the key at which the quota ends, and the packed rows of exactly that key, in flat order, to
the index at which it ends. `_apply` then decides every row by itself. All sums are of integers.

Example: one expert, one column, cut bin 20, quota 2; b = 20 << BIN_SHIFT:

    token   key          weight
    0       b + 5         .25     kept, the lower index of the tie
    1       b + 9         .5      kept, the larger key
    2       b + 5         .25     dropped (a vision token)
    3       40 << 10     1.       kept, above the cut bin

    stats: mass 2.0 routed, 0.25 lost, 0 added; 1 dropped, 0 added, 1 dropped of vision.

Shape letters: T tokens, C columns, G groups.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.cut_tokens import ref
from sglang_moelb.kernels.launch import Launcher, variant_of

TILE_ENTRIES = 1024
SCAN_ENTRIES = 8192

BIN_SHIFT = tl.constexpr(row_layout.BIN_SHIFT)
BIN_KEYS = tl.constexpr(1 << row_layout.BIN_SHIFT)
LAST_BIN_KEY = tl.constexpr((1 << row_layout.BIN_SHIFT) - 1)
KEY_BITS = tl.constexpr(row_layout.KEY_BITS)
FLAG_PROTECTED = tl.constexpr(row_layout.FLAG_PROTECTED)
FLAG_VISION = tl.constexpr(row_layout.FLAG_VISION)
MASS_ONE = tl.constexpr(row_layout.MASS_ONE)
MAX_WEIGHT = tl.constexpr(ref.MAX_WEIGHT)
# What `_mark` writes for an entry that does not wait; one that waits is group << KEY_BITS | key.
KEEP = tl.constexpr(-1)
DROP = tl.constexpr(-2)


@triton.jit(do_not_specialize=["num_tokens", "ids_stride"])
def _mark(
    ids_ptr,
    keys_ptr,
    flags_ptr,
    amounts_ptr,
    cut_bin_ptr,
    marks_ptr,
    sums_ptr,
    stats_ptr,
    num_tokens,
    ids_stride,
    NUM_EXPERTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    HAS_AMOUNTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(stats_ptr + tl.arange(0, 8), tl.zeros([8], tl.int64))
    token = tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    is_token = token < num_tokens
    flags = tl.load(flags_ptr + token, mask=is_token, other=0)
    inside = is_token[:, None] & (column < NUM_COLUMNS)
    ids = tl.load(ids_ptr + token[:, None] * ids_stride + column, mask=inside, other=-1)
    ids = ids.to(tl.int32)
    flat = token[:, None] * NUM_COLUMNS + column
    key = tl.load(keys_ptr + flat, mask=inside, other=0)
    may_drop = (ids >= 0) & (ids < NUM_EXPERTS) & ((flags & FLAG_PROTECTED) == 0)[:, None]
    group = tl.where(may_drop, ids // GROUP_SIZE, 0)
    cut_bin = tl.load(cut_bin_ptr + group, mask=may_drop, other=-1)
    bins = key >> BIN_SHIFT
    waits = may_drop & (bins == cut_bin)
    mark = tl.where(may_drop & (bins < cut_bin), DROP, KEEP)
    mark = tl.where(waits, (group << KEY_BITS) + key, mark)
    tl.store(marks_ptr + flat, mark, mask=inside)
    amounts = tl.full([TILE_TOKENS, TILE_COLUMNS], 1, tl.int32)
    if HAS_AMOUNTS:
        amounts *= tl.load(amounts_ptr + token, mask=is_token, other=0)[:, None]
    sums_at = sums_ptr + group * BIN_KEYS + (key & (BIN_KEYS - 1))
    tl.atomic_add(sums_at, amounts, mask=waits, sem="relaxed")


@triton.jit
def _matching(marks_ptr, amounts_ptr, flat, target, num_entries, NUM_COLUMNS, HAS_AMOUNTS):
    """Amounts of the entries at `flat` whose mark is `target`, 0 for others."""
    mark = tl.load(marks_ptr + flat, mask=flat < num_entries, other=KEEP)
    amounts = (mark == target).to(tl.int32)
    if HAS_AMOUNTS:
        amounts = tl.load(amounts_ptr + flat // NUM_COLUMNS, mask=mark == target, other=0)
    return amounts


@triton.jit(do_not_specialize=["num_entries"])
def _find(
    marks_ptr,
    amounts_ptr,
    sums_ptr,
    cut_bin_ptr,
    quota_ptr,
    last_mark_ptr,
    end_ptr,
    num_entries,
    NUM_COLUMNS: tl.constexpr,
    HAS_AMOUNTS: tl.constexpr,
    SCAN_ENTRIES: tl.constexpr,
):
    group = tl.program_id(0)
    cut_bin = tl.load(cut_bin_ptr + group)
    if cut_bin >= 0:
        quota = tl.load(quota_ptr + group)
        # Keys lie in descending order here, so that a running sum is a sum from the top.
        low_bits = LAST_BIN_KEY - tl.arange(0, BIN_KEYS)
        sums = tl.load(sums_ptr + group * BIN_KEYS + low_bits)
        from_top = tl.cumsum(sums, axis=0)
        cut_low_bits = tl.sum((from_top > quota).to(tl.int32)) - 1
        left = tl.sum(tl.where(low_bits == cut_low_bits, quota - (from_top - sums), 0))
        # Where all that waits fits, -1 makes this mark one below the bin, so that all is kept.
        target = (group << KEY_BITS) + (cut_bin << BIN_SHIFT) + cut_low_bits
        tl.store(last_mark_ptr + group, target)
        end = tl.zeros([], tl.int64)
        if (cut_low_bits >= 0) & (left > 0):
            start = tl.zeros([], tl.int64)
            entry = tl.arange(0, SCAN_ENTRIES)
            amounts = _matching(
                marks_ptr, amounts_ptr, entry, target, num_entries, NUM_COLUMNS, HAS_AMOUNTS
            )
            here = tl.sum(amounts)
            # The sum at this key exceeds what is left, so this ends before the entries do.
            while (here <= left) & (start < num_entries):
                left -= here
                start += SCAN_ENTRIES
                amounts = _matching(
                    marks_ptr,
                    amounts_ptr,
                    start + entry,
                    target,
                    num_entries,
                    NUM_COLUMNS,
                    HAS_AMOUNTS,
                )
                here = tl.sum(amounts)
            fits = (tl.cumsum(amounts, axis=0) <= left).to(tl.int32)
            end = start + tl.sum(fits)
        tl.store(end_ptr + group, end)


@triton.jit
def _mass(weights):
    """round-half-even(weights * MASS_ONE) as int64, with NaN as 0."""
    weights = tl.where(weights == weights, weights, 0.0)
    units = tl.minimum(tl.maximum(weights, -MAX_WEIGHT), MAX_WEIGHT) * MASS_ONE
    below = tl.floor(units)
    rest = units - below
    mass = below.to(tl.int64)
    is_odd = (mass & 1) != 0
    return mass + ((rest > 0.5) | ((rest == 0.5) & is_odd)).to(tl.int64)


@triton.jit(do_not_specialize=["num_tokens", "ids_stride", "weights_stride"])
def _apply(
    ids_ptr,
    weights_ptr,
    flags_ptr,
    marks_ptr,
    last_mark_ptr,
    end_ptr,
    new_ids_ptr,
    new_weights_ptr,
    stats_ptr,
    num_tokens,
    ids_stride,
    weights_stride,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TOPK: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    is_token = token < num_tokens
    flags = tl.load(flags_ptr + token, mask=is_token, other=0)
    vision = ((flags & FLAG_VISION) != 0)[:, None]
    inside = is_token[:, None] & (column < NUM_COLUMNS)
    ids = tl.load(ids_ptr + token[:, None] * ids_stride + column, mask=inside, other=-1)
    weights_at = weights_ptr + token[:, None] * weights_stride + column
    weights = tl.load(weights_at, mask=inside, other=0.0)
    flat = token[:, None] * NUM_COLUMNS + column
    mark = tl.load(marks_ptr + flat, mask=inside, other=KEEP)
    waits = mark >= 0
    group = tl.where(waits, mark >> KEY_BITS, 0)
    last_mark = tl.load(last_mark_ptr + group, mask=waits, other=0)
    end = tl.load(end_ptr + group, mask=waits, other=0)
    kept = (mark > last_mark) | ((mark == last_mark) & (flat < end))
    dropped = (mark == DROP) | (waits & (kept == 0))
    tl.store(new_ids_ptr + flat, tl.where(dropped, -1, ids), mask=inside)
    tl.store(new_weights_ptr + flat, tl.where(dropped, 0.0, weights), mask=inside)

    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    routed = column < TOPK
    lost = dropped & routed
    added = valid & (dropped == 0) & (column >= TOPK)
    mass = _mass(weights)
    routed_mass = tl.sum(tl.where(valid & routed, mass, 0))
    tl.atomic_add(stats_ptr, routed_mass, sem="relaxed")
    tl.atomic_add(stats_ptr + 1, tl.sum(tl.where(lost, mass, 0)), sem="relaxed")
    tl.atomic_add(stats_ptr + 2, tl.sum(tl.where(added, mass, 0)), sem="relaxed")
    tl.atomic_add(stats_ptr + 3, tl.sum(lost.to(tl.int64)), sem="relaxed")
    tl.atomic_add(stats_ptr + 4, tl.sum(added.to(tl.int64)), sem="relaxed")
    tl.atomic_add(stats_ptr + 5, tl.sum((lost & vision).to(tl.int64)), sem="relaxed")


def cut_tokens(
    ids_TC: Tensor,
    weights_TC: Tensor,
    keys_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    cut_bin_G: Tensor,
    cut_quota_G: Tensor,
    *,
    num_experts: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sglang_moelb.kernels.cut_tokens`. Runs on the device of its tensors, no sync."""
    group_size = ref.experts_per_group(num_experts, cut_bin_G.numel())
    ids_TC = ids_TC if ids_TC.stride(1) == 1 else ids_TC.contiguous()
    weights_TC = weights_TC if weights_TC.stride(1) == 1 else weights_TC.contiguous()
    new_ids_TC = torch.empty(ids_TC.shape, dtype=ids_TC.dtype, device=ids_TC.device)
    new_weights_TC = torch.empty(ids_TC.shape, dtype=torch.float32, device=ids_TC.device)
    if ids_TC.numel() == 0:
        return new_ids_TC, new_weights_TC, torch.zeros(8, dtype=torch.int64, device=ids_TC.device)
    stats_8 = torch.empty(8, dtype=torch.int64, device=ids_TC.device)
    tile = _tile(ids_TC.shape[1], num_experts)
    cuts = (cut_bin_G, cut_quota_G)
    marks = _decide(ids_TC, keys_TC, flags_T, amounts_T, cuts, stats_8, group_size, tile)
    num_tokens = ids_TC.shape[0]
    _launch_apply(
        (-(-num_tokens // tile["TILE_TOKENS"]), 1, 1),
        variant_of(num_warps=8, TOPK=topk, **tile),
        (ids_TC, weights_TC, flags_T, *marks, new_ids_TC, new_weights_TC, stats_8),
        (num_tokens, ids_TC.stride(0), weights_TC.stride(0)),
    )
    return new_ids_TC, new_weights_TC, stats_8


@lru_cache(maxsize=256)
def _tile(num_columns: int, num_experts: int) -> dict[str, int]:
    """Compile-time arguments that `_mark` and `_apply` share."""
    tile_columns = triton.next_power_of_2(num_columns)
    return {
        "NUM_EXPERTS": num_experts,
        "NUM_COLUMNS": num_columns,
        "TILE_TOKENS": max(1, TILE_ENTRIES // tile_columns),
        "TILE_COLUMNS": tile_columns,
    }


def _decide(
    ids_TC: Tensor,
    keys_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    cuts: tuple[Tensor, Tensor],
    stats_8: Tensor,
    group_size: int,
    tile: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The marks of all entries, and each group's last kept mark and the flat index at its end."""
    cut_bin_G, cut_quota_G = cuts
    num_tokens, num_columns = ids_TC.shape
    marks_TC = torch.empty(ids_TC.shape, dtype=torch.int32, device=ids_TC.device)
    sums = torch.zeros(
        len(cut_bin_G) << row_layout.BIN_SHIFT, dtype=torch.int32, device=ids_TC.device
    )
    last_mark_G = torch.empty_like(cut_bin_G)
    end_G = torch.empty_like(cut_bin_G, dtype=torch.int64)
    amounts = flags_T if amounts_T is None else amounts_T
    _launch_mark(
        (-(-num_tokens // tile["TILE_TOKENS"]), 1, 1),
        variant_of(num_warps=8, GROUP_SIZE=group_size, HAS_AMOUNTS=amounts_T is not None, **tile),
        (ids_TC, keys_TC.contiguous(), flags_T, amounts, cut_bin_G, marks_TC, sums, stats_8),
        (num_tokens, ids_TC.stride(0)),
    )
    find = variant_of(
        num_warps=16,
        NUM_COLUMNS=num_columns,
        HAS_AMOUNTS=amounts_T is not None,
        SCAN_ENTRIES=SCAN_ENTRIES,
    )
    _launch_find(
        (cut_bin_G.shape[0], 1, 1),
        find,
        (marks_TC, amounts, sums, cut_bin_G, cut_quota_G, last_mark_G, end_G),
        (num_tokens * num_columns,),
    )
    return marks_TC, last_mark_G, end_G


_launch_apply, _launch_mark, _launch_find = Launcher(_apply), Launcher(_mark), Launcher(_find)
