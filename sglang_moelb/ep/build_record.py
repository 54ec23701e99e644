"""From the counts and times of a pass to its `StepRecord`. Light to import: no torch.

Shape letters: L MoE layers, E logical experts, R ranks, M modalities, W width of a row of counts,
S sources of rows that share capacities, G groups, C counts of an expert.
"""

from __future__ import annotations

import numpy as np

from sglang_moelb.controller.plan import kept_amount
from sglang_moelb.ep.capacity import group_capacity, num_groups_of
from sglang_moelb.ep.controller_messages import RawPass
from sglang_moelb.kernels.row_layout import (
    C_CUTTABLE_AMOUNT,
    C_PROTECTED_AMOUNT,
    C_TEXT_ROWS,
    C_VISION_ROWS,
    H_PROTECTED_TOKENS,
    H_REFUSED_TOKENS,
    H_TOKENS,
    H_VISION_TOKENS,
    MASS_ONE,
    NUM_COUNTS,
    NUM_HEADER,
)
from sglang_moelb.types import (
    FloatArray,
    IntArray,
    Lever,
    RankReport,
    Rule,
    Scope,
    StepRecord,
    Topology,
)

ROWS = [C_TEXT_ROWS, C_VISION_ROWS]


def build(
    raw: RawPass,
    counts_RLW: np.ndarray,
    stats_R8: np.ndarray,
    low_LE: np.ndarray,
    copied_LR2: np.ndarray,
    topology: Topology,
    rank: int,
    mass_per_token: float,
) -> StepRecord:
    """The record of a pass, which shares no memory with its int32 counts and int64 stats.

    `stats_R8` is what a lever did on each rank, read only where one acted; `mass_per_token` the
    gate mass of a token in a layer, by which passes without a lever are counted: only a cut
    measures mass. `low_LE` is 1 for experts that `downgrade` lowered, `copied_LR2` the rows and
    copies of each rank under `replicate`; each is read only where that lever acted.
    """
    counts_LREC = _counts(counts_RLW, topology)
    stats_8 = stats_R8.sum(axis=0).tolist() if raw.lever.cuts else [0] * 8
    header_RW = counts_RLW[:, 0, :NUM_HEADER].astype(np.int64)
    # Rows of an expert stay far below 2**31, and numpy adds up int32 many times faster as int32.
    rows_LEM = counts_LREC.sum(axis=1, dtype=np.int32)[..., ROWS].astype(np.int64)
    return StepRecord(
        step=raw.step,
        policy=raw.agreed.policy,
        phase=raw.agreed.phase,  # type: ignore[arg-type]
        gate_reason=raw.gate_reason,
        rank=rank,
        num_tokens_R=header_RW[:, H_TOKENS],
        num_vision_tokens_R=header_RW[:, H_VISION_TOKENS],
        num_protected_tokens_R=header_RW[:, H_PROTECTED_TOKENS],
        num_refused_tokens_R=header_RW[:, H_REFUSED_TOKENS],
        rows_LEM=rows_LEM,
        rows_after_LR=copied_LR2[..., 0].astype(np.int64)
        if raw.lever is Lever.REPLICATE
        else _rows_after(counts_LREC, rows_LEM, raw, topology),
        routed_mass=stats_8[0] / MASS_ONE
        if raw.lever.cuts
        else mass_per_token * int(counts_RLW[:, :, H_TOKENS].sum()),
        lost_mass=stats_8[1] / MASS_ONE,
        moved_mass=(stats_8[2] + stats_8[6]) / MASS_ONE,
        num_dropped_rows=stats_8[3],
        num_added_rows=stats_8[4] + stats_8[7],
        experts_ms_L=_times(raw.experts_ms_L, topology),
        layer_ms_L=_times(raw.layer_ms_L, topology),
        balance_ms=raw.balance_ms,
        step_ms=raw.step_ms,
        low_rows_LR=rank_rows(rows_LEM.sum(axis=2) * low_LE, topology.num_ranks)
        if raw.lever is Lever.DOWNGRADE
        else None,
        num_copies_LR=copied_LR2[..., 1].astype(np.int64)
        if raw.lever is Lever.REPLICATE
        else None,
        reports=tuple(
            RankReport(rank=other, step=sizes.timed_step, experts_ms=sizes.experts_us / 1e3)
            for other, sizes in enumerate(raw.agreed.sizes_R)
            if other != rank and sizes.experts_us > 0
        ),
    )


def rows_by_source(counts_RLW: np.ndarray, topology: Topology) -> IntArray:
    """Top-k rows of a pass by source rank, int64 [L, R, E, M]."""
    rows_LREM: IntArray = _counts(counts_RLW, topology)[..., ROWS].astype(np.int64)
    return rows_LREM


def rank_rows(rows_LE: IntArray, num_ranks: int) -> IntArray:
    """Rows on each rank, `[L, R]`, from rows on each logical expert."""
    rows_LR: IntArray = rows_LE.reshape(rows_LE.shape[0], num_ranks, -1).sum(axis=2)
    return rows_LR


def routed_rank_rows(rows_LEM: IntArray, num_ranks: int) -> IntArray:
    """Rows on each rank before any lever, `[L, R]`, from a record's rows by modality."""
    # An expert's modalities lie side by side, so they add up with the experts of its rank.
    return rank_rows(rows_LEM.reshape(len(rows_LEM), -1), num_ranks)


def _counts(counts_RLW: np.ndarray, topology: Topology) -> np.ndarray:
    """The counts of experts without the headers, int32 `[L, R, E, C]`."""
    num_ranks, num_layers, _ = counts_RLW.shape
    counts_RLEC = counts_RLW[:, :, NUM_HEADER:].reshape(
        num_ranks, num_layers, topology.num_experts, NUM_COUNTS
    )
    return counts_RLEC.transpose(1, 0, 2, 3)


def _times(times_ms_L: list[float], topology: Topology) -> FloatArray:
    return np.array(times_ms_L) if times_ms_L else np.zeros(topology.num_layers)


def _rows_after(
    counts_LREC: np.ndarray, rows_LEM: IntArray, raw: RawPass, topology: Topology
) -> IntArray:
    """Rows that each rank's experts receive, from the counts and the rule of the plan alone."""
    rows_LR = routed_rank_rows(rows_LEM, topology.num_ranks)
    if not raw.lever.cuts:
        return rows_LR
    policy = raw.agreed.policy
    by_source = policy.scope is Scope.SOURCE
    num_groups = num_groups_of(topology, policy.level)
    sources = range(topology.num_ranks) if by_source else [0]
    capacity_S = np.array([group_capacity(topology, raw.agreed, source) for source in sources])
    cuttable_LSG, protected_LSG = (
        _by_group(counts_LREC[..., column], num_groups, by_source=by_source)
        for column in (C_CUTTABLE_AMOUNT, C_PROTECTED_AMOUNT)
    )
    kept_LSG = kept_amount(cuttable_LSG, protected_LSG, capacity_S[:, None])
    kept_LR = rank_rows(kept_LSG.sum(axis=1), topology.num_ranks)
    if policy.rule is Rule.PLAIN:
        return kept_LR
    amounts_LR = rank_rows((cuttable_LSG + protected_LSG).sum(axis=1), topology.num_ranks)
    estimate_LR: IntArray = (rows_LR * kept_LR) // np.maximum(amounts_LR, 1)
    return estimate_LR


def _by_group(amounts_LRE: np.ndarray, num_groups: int, *, by_source: bool) -> IntArray:
    """Amounts of each source and group; one source stands for all ranks unless `by_source`."""
    amounts_LSE = amounts_LRE.astype(np.int64)
    if not by_source:
        amounts_LSE = amounts_LSE.sum(axis=1, keepdims=True)
    amounts_LSG: IntArray = amounts_LSE.reshape(*amounts_LSE.shape[:2], num_groups, -1).sum(axis=3)
    return amounts_LSG
