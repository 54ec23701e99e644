"""Triton kernel of `count_experts`: a program per tile of tokens, integer atomics into the row.

`count_layers` runs it with a second grid axis, one slice a layer.

Integer sums do not depend on their order, so every run gives the same bits.

Example: E = 2, topk = C = 2, four tokens, no amounts, no key_rule:

    token   ids       weights     flags          counts as
    0       [0, 1]    .75 .25     text           a text row of each expert
    1       [1, -1]   1.  0.      FLAG_VISION    a vision row of expert 1
    2       [-1, -1]  0.  0.      text           nothing, it is padding
    3       [1, 0]    .5  .5      FLAG_PROTECTED a text row of each expert that cannot be cut,
                                  FLAG_REFUSED   and a refused one

    header    3 tokens, 1 vision, 1 protected, vision amount 1, amount 3, 1 refused, 0 0
    expert 0  2 text, 0 vision, 1 refused rows; protected amount 1, cuttable amount 1
    expert 1  2 text, 1 vision, 1 refused rows; protected amount 1, cuttable amount 2

Shape letters: T tokens, C columns, K top-k, E experts, L layers, W row width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import keys, row_layout
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.launch import Launcher, Variant, variant_of
from sglang_moelb.types import Metric, Preference

TILE_ENTRIES = 1024
MIN_TILE_EXPERTS = 32  # a warp's worth of bins, below which tl.histogram is not exercised upstream

AMOUNT_ONE = tl.constexpr(row_layout.AMOUNT_ONE)
BIN_SHIFT = tl.constexpr(row_layout.BIN_SHIFT)
FLAG_PROTECTED = tl.constexpr(row_layout.FLAG_PROTECTED)
FLAG_REFUSED = tl.constexpr(row_layout.FLAG_REFUSED)
FLAG_VISION = tl.constexpr(row_layout.FLAG_VISION)
NUM_BINS = tl.constexpr(row_layout.NUM_BINS)
NUM_COUNTS = tl.constexpr(row_layout.NUM_COUNTS)
NUM_HEADER = tl.constexpr(row_layout.NUM_HEADER)
H_TOKENS = tl.constexpr(row_layout.H_TOKENS)
H_VISION_TOKENS = tl.constexpr(row_layout.H_VISION_TOKENS)
H_PROTECTED_TOKENS = tl.constexpr(row_layout.H_PROTECTED_TOKENS)
H_VISION_AMOUNT = tl.constexpr(row_layout.H_VISION_AMOUNT)
H_AMOUNT = tl.constexpr(row_layout.H_AMOUNT)
H_REFUSED_TOKENS = tl.constexpr(row_layout.H_REFUSED_TOKENS)
C_TEXT_ROWS = tl.constexpr(row_layout.C_TEXT_ROWS)
C_VISION_ROWS = tl.constexpr(row_layout.C_VISION_ROWS)
C_REFUSED_ROWS = tl.constexpr(row_layout.C_REFUSED_ROWS)
C_PROTECTED_AMOUNT = tl.constexpr(row_layout.C_PROTECTED_AMOUNT)
C_CUTTABLE_AMOUNT = tl.constexpr(row_layout.C_CUTTABLE_AMOUNT)

METRIC_BITS = tl.constexpr(keys.METRIC_BITS)
HASH_SHIFT = tl.constexpr(32 - keys.METRIC_BITS)
PREFERRED = tl.constexpr(1 << keys.METRIC_BITS)
MAX_METRIC = tl.constexpr(keys.MAX_METRIC)
SCORE_ORIGIN_BITS = tl.constexpr(keys.SCORE_ORIGIN_BITS)
SCORE_SHIFT = tl.constexpr(keys.SCORE_SHIFT)
HASH_TOKEN = tl.constexpr(keys.HASH_TOKEN)
HASH_EXPERT = tl.constexpr(keys.HASH_EXPERT)
HASH_MIX_1 = tl.constexpr(keys.HASH_MIX_1)
HASH_MIX_2 = tl.constexpr(keys.HASH_MIX_2)
SCORE = tl.constexpr(int(Metric.SCORE))
ORDER = tl.constexpr(int(Metric.ORDER))
RANDOM = tl.constexpr(int(Metric.RANDOM))
IMAGE_FIRST = tl.constexpr(int(Preference.IMAGE_FIRST))
TEXT_FIRST = tl.constexpr(int(Preference.TEXT_FIRST))
# A tile counts tokens of 4 classes: 0 text, 1 vision, 2 protected text, 3 protected vision.
NUM_CLASSES = tl.constexpr(4)
PROTECTED_CLASS = tl.constexpr(2)


@triton.jit
def _score_metric(value):
    bits = value.to(tl.int32, bitcast=True)
    metric = (bits - SCORE_ORIGIN_BITS) >> SCORE_SHIFT
    metric = tl.minimum(tl.maximum(metric, 0), MAX_METRIC)
    return tl.where(value > 0, metric, 0)


@triton.jit
def _random_metric(token, expert, seed):
    word = token.to(tl.uint32) * HASH_TOKEN + expert.to(tl.uint32) * HASH_EXPERT
    word += seed.to(tl.uint32)
    word ^= word >> 16
    word *= HASH_MIX_1
    word ^= word >> 13
    word *= HASH_MIX_2
    word ^= word >> 16
    return (word >> HASH_SHIFT).to(tl.int32)


@triton.jit
def _keys(ids, token, amount, vision, weights_at, mask, num_tokens, metric, preference, seed):
    # Branches at run time: a hot change of the policy must not wait for a compiler.
    if metric == SCORE:
        value = tl.load(weights_at, mask=mask, other=0.0)
        key = _score_metric(value * (amount.to(tl.float32) * (1.0 / AMOUNT_ONE)))
    elif metric == RANDOM:
        key = _random_metric(token, ids, seed)
    else:
        place = (token * MAX_METRIC) // tl.maximum(num_tokens - 1, 1).to(tl.int64)
        place = tl.where(metric == ORDER, MAX_METRIC - place, place)
        key = place.to(tl.int32) + tl.zeros_like(ids)
    vision_first = (preference == TEXT_FIRST) & vision
    text_first = (preference == IMAGE_FIRST) & (vision == 0)
    key += tl.where(vision_first | text_first, PREFERRED, 0)
    return tl.where(mask, key, 0)


@triton.jit
def _add(at, values):
    tl.atomic_add(at, values, mask=values != 0, sem="relaxed")


@triton.jit
def _add_header(row_ptr, counted, vision, protected, amount):
    counted_vision = counted * vision.to(tl.int32)
    num_protected = tl.sum(counted * protected.to(tl.int32))
    tl.atomic_add(row_ptr + H_TOKENS, tl.sum(counted), sem="relaxed")
    tl.atomic_add(row_ptr + H_VISION_TOKENS, tl.sum(counted_vision), sem="relaxed")
    tl.atomic_add(row_ptr + H_PROTECTED_TOKENS, num_protected, sem="relaxed")
    tl.atomic_add(row_ptr + H_VISION_AMOUNT, tl.sum(counted_vision * amount), sem="relaxed")
    tl.atomic_add(row_ptr + H_AMOUNT, tl.sum(counted * amount), sem="relaxed")
    return num_protected


@triton.jit
def _add_refused(
    row_ptr,
    ids,
    counted,
    refused,
    routed,
    NUM_ENTRIES: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
):
    """Tokens and rows of requests that refuse, of the entries in `routed`."""
    num_tokens = tl.sum(counted * refused.to(tl.int32))
    tl.atomic_add(row_ptr + H_REFUSED_TOKENS, num_tokens, sem="relaxed")
    theirs = routed & refused[:, None]
    rows = tl.histogram(
        tl.reshape(tl.where(theirs, ids, 0), [NUM_ENTRIES]),
        TILE_EXPERTS,
        mask=tl.reshape(theirs, [NUM_ENTRIES]),
    )
    _add(row_ptr + NUM_HEADER + tl.arange(0, TILE_EXPERTS) * NUM_COUNTS + C_REFUSED_ROWS, rows)


@triton.jit
def _add_rows(
    row_ptr,
    ids,
    vision,
    protected,
    routed,
    WITH_AMOUNTS: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
):
    """Rows by expert, and their amounts where each is 1, of the entries in `routed`."""
    # Rows of hot experts meet in a histogram of the tile first: one atomic a tile, not one a row.
    token_class = vision.to(tl.int32) + PROTECTED_CLASS * protected.to(tl.int32)
    codes = token_class[:, None] * TILE_EXPERTS + tl.where(routed, ids, 0)
    rows = tl.histogram(
        tl.reshape(codes, [NUM_ENTRIES]),
        NUM_CLASSES * TILE_EXPERTS,
        mask=tl.reshape(routed, [NUM_ENTRIES]),
    )
    rows = tl.reshape(rows, [NUM_CLASSES, TILE_EXPERTS])
    of_class = tl.arange(0, NUM_CLASSES)[:, None]
    text_rows = tl.sum(tl.where(of_class % PROTECTED_CLASS == 0, rows, 0), axis=0)
    vision_rows = tl.sum(tl.where(of_class % PROTECTED_CLASS == 1, rows, 0), axis=0)
    free_rows = tl.sum(tl.where(of_class < PROTECTED_CLASS, rows, 0), axis=0)
    counts_at = row_ptr + NUM_HEADER + tl.arange(0, TILE_EXPERTS) * NUM_COUNTS
    _add(counts_at + C_TEXT_ROWS, text_rows)
    _add(counts_at + C_VISION_ROWS, vision_rows)
    if WITH_AMOUNTS:
        _add(counts_at + C_PROTECTED_AMOUNT, text_rows + vision_rows - free_rows)
        _add(counts_at + C_CUTTABLE_AMOUNT, free_rows)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "ids_layer_stride",
        "row_layer_stride",
        "ids_stride",
        "weights_stride",
        "metric",
        "preference",
        "seed",
        "routed_first",
    ]
)
def _count(
    ids_ptr,
    weights_ptr,
    flags_ptr,
    amounts_ptr,
    row_ptr,
    keys_ptr,
    num_tokens,
    ids_layer_stride,
    row_layer_stride,
    ids_stride,
    weights_stride,
    metric,
    preference,
    seed,
    routed_first,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TOPK: tl.constexpr,
    HAS_AMOUNTS: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    ids_ptr += layer * ids_layer_stride
    row_ptr += layer * row_layer_stride
    token = tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    is_token = token < num_tokens
    flags = tl.load(flags_ptr + token, mask=is_token, other=0)
    vision = (flags & FLAG_VISION) != 0
    protected = (flags & FLAG_PROTECTED) != 0
    amount = tl.full([TILE_TOKENS], 1, tl.int32)
    if HAS_AMOUNTS:
        amount = tl.load(amounts_ptr + token, mask=is_token, other=0)
    inside = is_token[:, None] & (column < NUM_COLUMNS)
    ids = tl.load(ids_ptr + token[:, None] * ids_stride + column, mask=inside, other=-1)
    ids = ids.to(tl.int32)
    routed = column < TOPK
    counted = tl.max(((ids >= 0) & routed).to(tl.int32), axis=1)
    num_protected = _add_header(row_ptr, counted, vision, protected, amount)

    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    _add_rows(
        row_ptr,
        ids,
        vision,
        protected,
        valid & routed,
        not HAS_AMOUNTS,
        TILE_TOKENS * TILE_COLUMNS,
        TILE_EXPERTS,
    )
    if num_protected > 0:  # few tiles have such rows, and the others do not pay for them
        _add_refused(
            row_ptr,
            ids,
            counted,
            (flags & FLAG_REFUSED) != 0,
            valid & routed,
            TILE_TOKENS * TILE_COLUMNS,
            TILE_EXPERTS,
        )
    cuttable = valid & (protected == 0)[:, None]
    amounts = tl.zeros([TILE_TOKENS, TILE_COLUMNS], tl.int32) + amount[:, None]
    counts_at = row_ptr + NUM_HEADER + ids * NUM_COUNTS
    if HAS_AMOUNTS:
        fixed = valid & routed & protected[:, None]
        tl.atomic_add(counts_at + C_PROTECTED_AMOUNT, amounts, mask=fixed, sem="relaxed")
        tl.atomic_add(counts_at + C_CUTTABLE_AMOUNT, amounts, mask=cuttable, sem="relaxed")
    elif NUM_COLUMNS > TOPK:
        extra = cuttable & (column >= TOPK)
        tl.atomic_add(counts_at + C_CUTTABLE_AMOUNT, amounts, mask=extra, sem="relaxed")

    if HAS_KEYS:
        key = _keys(
            ids,
            token[:, None] + tl.zeros_like(column),
            amounts if HAS_AMOUNTS else amounts * AMOUNT_ONE,
            vision[:, None],
            weights_ptr + token[:, None] * weights_stride + column,
            valid,
            num_tokens,
            metric,
            preference,
            seed,
        )
        key = (key >> routed_first) + tl.where(valid & routed, routed_first << METRIC_BITS, 0)
        tl.store(keys_ptr + token[:, None] * NUM_COLUMNS + column, key, mask=inside)
        bins_ptr = row_ptr + NUM_HEADER + NUM_EXPERTS * NUM_COUNTS
        bins_at = bins_ptr + ids * NUM_BINS + (key >> BIN_SHIFT)
        tl.atomic_add(bins_at, amounts, mask=cuttable, sem="relaxed")


def count_experts(
    ids_TC: Tensor,
    weights_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    *,
    num_experts: int,
    topk: int,
    key_rule: KeyRule | None,
) -> tuple[Tensor, Tensor | None]:
    """See `sglang_moelb.kernels.count_experts`. Runs on the device of its tensors, no sync."""
    num_tokens, num_columns = ids_TC.shape
    width = row_layout.row_width(num_experts, with_histogram=key_rule is not None)
    row_W = torch.zeros(width, dtype=torch.int32, device=ids_TC.device)
    keys_TC = None
    if key_rule is not None:
        if key_rule.metric not in tuple(Metric):
            raise ValueError(
                f"metric {key_rule.metric} is not one of {[int(metric) for metric in Metric]}"
            )
        keys_TC = torch.empty(ids_TC.shape, dtype=torch.int32, device=ids_TC.device)
    if num_tokens == 0:
        return row_W, keys_TC
    ids_TC = ids_TC if ids_TC.stride(1) == 1 else ids_TC.contiguous()
    weights_TC = weights_TC if weights_TC.stride(1) == 1 else weights_TC.contiguous()
    variant = _variant(
        num_experts,
        num_columns,
        topk,
        has_amounts=amounts_T is not None,
        has_keys=keys_TC is not None,
    )
    _launch(
        (-(-num_tokens // variant.constants["TILE_TOKENS"]), 1, 1),
        variant,
        (
            ids_TC,
            weights_TC,
            flags_T,
            flags_T if amounts_T is None else amounts_T,
            row_W,
            row_W if keys_TC is None else keys_TC,
        ),
        (num_tokens, 0, 0, ids_TC.stride(0), weights_TC.stride(0), *_rule_numbers(key_rule)),
    )
    return row_W, keys_TC


def count_layers(
    ids_LTK: Tensor, flags_T: Tensor, *, num_experts: int, out_LW: Tensor | None = None
) -> Tensor:
    """See `sglang_moelb.kernels.count_experts`. Runs on the device of its tensors, no sync."""
    num_layers, num_tokens, topk = ids_LTK.shape
    width = row_layout.row_width(num_experts, with_histogram=False)
    if out_LW is None:
        rows_LW = torch.zeros(num_layers, width, dtype=torch.int32, device=ids_LTK.device)
    else:
        rows_LW = out_LW.zero_()
    if num_tokens == 0:
        return rows_LW
    variant = _variant(num_experts, topk, topk, has_amounts=False, has_keys=False)
    _launch(
        (-(-num_tokens // variant.constants["TILE_TOKENS"]), num_layers, 1),
        variant,
        (ids_LTK, ids_LTK, flags_T, flags_T, rows_LW, rows_LW),
        (num_tokens, ids_LTK.stride(0), width, ids_LTK.stride(1), 0, 0, 0, 0, 0),
    )
    return rows_LW


def _rule_numbers(key_rule: KeyRule | None) -> tuple[int, int, int, int]:
    if key_rule is None:
        return 0, 0, 0, 0
    return (
        int(key_rule.metric),
        int(key_rule.preference),
        keys.hash_seed(key_rule.seed),
        int(key_rule.routed_first),
    )


@lru_cache(maxsize=256)
def _variant(
    num_experts: int, num_columns: int, topk: int, *, has_amounts: bool, has_keys: bool
) -> Variant:
    tile_columns = triton.next_power_of_2(num_columns)
    return variant_of(
        num_warps=8,
        NUM_EXPERTS=num_experts,
        NUM_COLUMNS=num_columns,
        TOPK=topk,
        HAS_AMOUNTS=has_amounts,
        HAS_KEYS=has_keys,
        TILE_TOKENS=max(1, TILE_ENTRIES // tile_columns),
        TILE_COLUMNS=tile_columns,
        TILE_EXPERTS=max(MIN_TILE_EXPERTS, triton.next_power_of_2(num_experts)),
    )


_launch = Launcher(_count)
