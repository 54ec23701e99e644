"""Rules that lose something: capacities (drop, expand, MACS) and low precision (ReaLB).

Counts stand in for tokens: which rows are lost does not matter to the ranks' load. Where a rule
asks for scores or features, what is assumed instead is in its docstring.

Shape letters: P passes, L MoE layers, S source ranks, R EP ranks, E logical experts,
G groups that share a capacity.
"""

from __future__ import annotations

import numpy as np

from sglang_moelb.controller.plan import (
    AMOUNT_ONE,
    capacity_rows,
    expert_classes,
    kept_amount,
    macs_capacity,
)
from sglang_moelb.replay.types import Counts, Outcome, by_rank
from sglang_moelb.types import IntArray, Level, Lever

MACS_VISION = AMOUNT_ONE // 2  # the mean weight: a sigmoid of a score with mean 0


def capacity(
    counts: Counts, *, lever: Lever, factor: float, level: Level = Level.DEVICE
) -> Outcome:
    """Our `drop` and `expand` (fill) at scope global, by the planner's capacities.

    Protected tokens are taken to be spread evenly. Expansion adds rows of the rank's own tokens, at
    most each token once an expert, which assumes that local candidates abound.
    """
    rows_PLG = counts.rows_PLR if level is Level.DEVICE else counts.rows_PLE
    num_groups = rows_PLG.shape[2]
    cap_PL1 = _capacities(factor, rows_PLG.sum(axis=2, keepdims=True), num_groups)
    num_tokens_P = np.maximum(counts.num_tokens_PS.sum(axis=1), 1)
    protected_PLG = (
        rows_PLG * counts.num_protected_P[:, None, None] // num_tokens_P[:, None, None]
    )
    kept_PLG = kept_amount(rows_PLG - protected_PLG, protected_PLG, cap_PL1)
    lost_PL = (rows_PLG - kept_PLG).sum(axis=2)
    if lever is Lever.EXPAND:
        per_rank_P = num_tokens_P // counts.num_ranks
        limit_P = per_rank_P * (counts.rows_PLEM.shape[2] // num_groups)
        room_PLG = np.maximum(cap_PL1 - kept_PLG, 0)
        kept_PLG = kept_PLG + np.minimum(room_PLG, limit_P[:, None, None])
    return Outcome(
        rows_PLR=by_rank(kept_PLG, counts.num_ranks),
        lost_PL=lost_PL,
        levers_P=np.full(len(counts), int(lever)),
    )


def capacity_aware(counts: Counts, *, factor: float, expanded: bool = False) -> Outcome:
    """Capacity-Aware Inference as published: each expert, enforced on each source rank.

    Source ranks are those of the trace. In the expanded form every token of a source is a candidate
    of all experts of its own rank, which therefore fill up; a routed row that a better candidate
    displaces is not counted as lost. With another EP size a source owns the experts of its share.

    Source: Capacity-Aware Inference (arXiv 2503.05066), Algorithms 1 and 2; floor and at least 1.
    """
    rows_PLSE = counts.rows_PLSEM[..., 0] + counts.rows_PLSEM[..., 1]
    num_sources, num_experts = rows_PLSE.shape[2:]
    tokens_PS = counts.num_tokens_PS
    cap_PS = _capacities(factor, tokens_PS * counts.topk, num_experts)
    cap_P1S1 = cap_PS[:, None, :, None]
    kept_PLSE = np.minimum(rows_PLSE, cap_P1S1)
    lost_PL = (rows_PLSE - kept_PLSE).sum(axis=(2, 3))
    if expanded:
        own = np.arange(num_sources)[:, None] == np.arange(num_experts) * num_sources // num_experts
        full_PS = np.minimum(cap_PS, tokens_PS)
        kept_PLSE = np.where(own, full_PS[:, None, :, None], kept_PLSE)
    return Outcome(rows_PLR=by_rank(kept_PLSE.sum(axis=2), counts.num_ranks), lost_PL=lost_PL)


def macs(counts: Counts, *, factor: float, rho: float = 0.5) -> Outcome:
    """MACS: entropy-weighted load, capacity by the modality mix, overflow first to local experts.

    Entropies are not in a trace: a vision row weighs 0.5, their mean. Overflow goes to experts of
    the same rank that have room and is lost beyond. Source: MACS (arXiv 2605.05225) with the
    choices of `controller.plan.macs_capacity`.
    """
    text_PLE, vision_PLE = counts.rows_PLEM[..., 0], counts.rows_PLEM[..., 1]
    rows_PLE = text_PLE + vision_PLE
    vision_amount_PLE = vision_PLE * MACS_VISION
    amount_PLE = text_PLE * AMOUNT_ONE + vision_amount_PLE
    cap_PLE = np.empty_like(amount_PLE)
    for at in np.ndindex(*rows_PLE.shape[:2]):
        base = AMOUNT_ONE * capacity_rows(factor, int(rows_PLE[at].sum()), rows_PLE.shape[2])
        classes_E = expert_classes(vision_PLE[at], rows_PLE[at])
        vision_amount, amount = int(vision_amount_PLE[at].sum()), int(amount_PLE[at].sum())
        cap_PLE[at] = macs_capacity(base, vision_amount, amount, classes_E, rho)
    over_PLE = np.maximum(amount_PLE - cap_PLE, 0)
    over_rows_PLE = -(-over_PLE * rows_PLE // np.maximum(amount_PLE, 1))
    room_PLR = by_rank(np.maximum(cap_PLE - amount_PLE, 0), counts.num_ranks)
    over_PLR = np.maximum(by_rank(over_PLE, counts.num_ranks), 1)
    over_rows_PLR = by_rank(over_rows_PLE, counts.num_ranks)
    lost_PLR = over_rows_PLR - over_rows_PLR * np.minimum(room_PLR, over_PLR) // over_PLR
    return Outcome(rows_PLR=counts.rows_PLR - lost_PLR, lost_PL=lost_PLR.sum(axis=2))


def realb(
    counts: Counts, *, hot: float = 1.0, vision: float = 0.7, min_tokens: int = 2048
) -> Outcome:
    """ReaLB: ranks above `hot` times the mean and above `vision` in vision run at low precision.

    Rows stay; the machine's `low_speedup` says what low precision brings, with its conversion fully
    hidden. Source: ReaLB (arXiv 2604.19503), all conditions strict but the batch gate.
    """
    rows_PLR = counts.rows_PLR
    vision_PLR = by_rank(counts.rows_PLEM[..., 1], counts.num_ranks)
    mean_PL1 = rows_PLR.mean(axis=2, keepdims=True)
    large_P11 = (counts.num_tokens_PS.sum(axis=1) >= min_tokens)[:, None, None]
    low_PLR = (
        large_P11
        & (rows_PLR > hot * mean_PL1)
        & (vision_PLR > vision * np.maximum(rows_PLR, 1))
    )
    return Outcome(rows_PLR=rows_PLR, low_PLR=low_PLR.astype(np.int64))


def _capacities(factor: float, num_rows: IntArray, num_groups: int) -> IntArray:
    """`capacity_rows` of every number of rows, in their shape."""
    values, where = np.unique(num_rows, return_inverse=True)
    caps = np.array([capacity_rows(factor, int(value), num_groups) for value in values])
    found: IntArray = caps[where].reshape(num_rows.shape)
    return found
