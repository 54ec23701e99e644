"""From the layers of a pass to one `StepRecord`, and from records to what the status shows.

`PassLog` is filled on the hot path with device tensors and marks only. On CUDA its counts are
copied to pinned memory once, at the end of the pass; `build` runs in the controller thread.

Shape letters: T rows of this rank, L MoE layers, E logical experts, R ranks, M modalities, W width
of a row of counts, S sources of rows that share capacities, G groups, C counts of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_moelb.controller.plan import kept_amount
from sglang_moelb.ep.balance import LayerOutcome, group_capacity, num_groups_of
from sglang_moelb.ep.clock import DeviceMark, HostMark, mark_on
from sglang_moelb.ep.exchange import Agreed
from sglang_moelb.ep.low.plan import LowPlan
from sglang_moelb.kernels.row_layout import (
    C_CUTTABLE_AMOUNT,
    C_PROTECTED_AMOUNT,
    C_TEXT_ROWS,
    C_VISION_ROWS,
    H_PROTECTED_TOKENS,
    H_TOKENS,
    H_VISION_TOKENS,
    MASS_ONE,
    NUM_COUNTS,
    NUM_HEADER,
)
from sglang_moelb.types import IntArray, Lever, Rule, Scope, StepRecord, Topology

AnyMark = HostMark | DeviceMark
ROWS = [C_TEXT_ROWS, C_VISION_ROWS]
PARTS = ("dispatch", "balanced", "experts", "combine", "combined")


Marks = dict[str, AnyMark]


@dataclass(slots=True)
class PassLog:
    """One pass on the hot path; a layer has an outcome or plan where a lever acts, else its ids.

    `marks_L` holds the marks of a layer's parts, in the order of `PARTS`, or nothing: see `timed`.
    """

    step: int
    agreed: Agreed
    lever: Lever
    gate_reason: str
    begun: AnyMark
    timed: bool
    flags_T: torch.Tensor | None  # of the batch's rows, in a prefill pass
    ids_L: list[torch.Tensor] = field(default_factory=list)
    outcomes_L: list[LayerOutcome] = field(default_factory=list)
    plans_L: list[LowPlan] = field(default_factory=list)
    marks_L: list[Marks] = field(default_factory=list)
    observing: tuple[AnyMark, AnyMark] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCopy:
    """A closed pass, its tensors on the host or on their way; no stats where nothing was cut."""

    log: PassLog
    counts_LRW: torch.Tensor
    stats_R8: torch.Tensor | None
    ended: AnyMark
    low_LE: torch.Tensor | None = None


def close(
    log: PassLog, counts_LRW: torch.Tensor, stats_R8: torch.Tensor | None, device: torch.device
) -> HostCopy:
    """End the pass; asynchronous copies to the host on CUDA, none on CPU.

    The log lets go of its device tensors.
    """
    low_LE = torch.stack([plan.low_E for plan in log.plans_L]) if log.plans_L else None
    if device.type == "cuda":
        counts_LRW = _to_pinned(counts_LRW)
        stats_R8 = None if stats_R8 is None else _to_pinned(stats_R8)
        low_LE = None if low_LE is None else _to_pinned(low_LE)
    log.ids_L, log.outcomes_L, log.plans_L = [], [], []
    return HostCopy(
        log=log, counts_LRW=counts_LRW, stats_R8=stats_R8, ended=mark_on(device), low_LE=low_LE
    )


def rows_by_source(copy: HostCopy, topology: Topology) -> IntArray:
    """Top-k rows of a built pass by source rank, int64 [L, R, E, M]. In the controller thread."""
    rows_LREM: IntArray = _counts(copy, topology)[..., ROWS].astype(np.int64)
    return rows_LREM


def build(copy: HostCopy, topology: Topology, rank: int, mass_per_token: float) -> StepRecord:
    """The record of a closed pass; waits for the device, so never on the hot path.

    `mass_per_token` is the gate mass of a token in a layer, by which passes without a lever are
    counted: only a cut measures mass.
    """
    if isinstance(copy.ended, DeviceMark):
        copy.ended.wait()
    log = copy.log
    counts_LRW = copy.counts_LRW.numpy()
    counts_LREC = _counts(copy, topology)
    stats_8 = [0] * 8 if copy.stats_R8 is None else copy.stats_R8.numpy().sum(axis=0).tolist()
    header_RW = counts_LRW[0, :, :NUM_HEADER].astype(np.int64)
    # Rows of an expert stay far below 2**31, and numpy adds up int32 many times faster as int32.
    rows_LEM = counts_LREC.sum(axis=1, dtype=np.int32)[..., ROWS].astype(np.int64)
    return StepRecord(
        step=log.step,
        policy=log.agreed.policy,
        phase=log.agreed.phase,  # type: ignore[arg-type]
        gate_reason=log.gate_reason,
        rank=rank,
        num_tokens_R=header_RW[:, H_TOKENS],
        num_vision_tokens_R=header_RW[:, H_VISION_TOKENS],
        num_protected_tokens_R=header_RW[:, H_PROTECTED_TOKENS],
        rows_LEM=rows_LEM,
        rows_after_LR=_rows_after(counts_LREC, rows_LEM, log, topology),
        routed_mass=stats_8[0] / MASS_ONE
        if copy.stats_R8 is not None
        else mass_per_token * int(counts_LRW[:, :, H_TOKENS].sum()),
        lost_mass=stats_8[1] / MASS_ONE,
        moved_mass=(stats_8[2] + stats_8[6]) / MASS_ONE,
        num_dropped_rows=stats_8[3],
        num_added_rows=stats_8[4] + stats_8[7],
        experts_ms_L=_spans(log, "experts", "combine"),
        layer_ms_L=_spans(log, "dispatch", "combined"),
        balance_ms=_balance_ms(log),
        step_ms=log.begun.ms_until(copy.ended),  # type: ignore[arg-type]
        low_rows_LR=_low_rows(copy, rows_LEM, topology),
    )


def rank_rows(rows_LE: IntArray, num_ranks: int) -> IntArray:
    """Rows on each rank, `[L, R]`, from rows on each logical expert."""
    rows_LR: IntArray = rows_LE.reshape(rows_LE.shape[0], num_ranks, -1).sum(axis=2)
    return rows_LR


def routed_rank_rows(rows_LEM: IntArray, num_ranks: int) -> IntArray:
    """Rows on each rank before any lever, `[L, R]`, from a record's rows by modality."""
    # An expert's modalities lie side by side, so they add up with the experts of its rank.
    return rank_rows(rows_LEM.reshape(len(rows_LEM), -1), num_ranks)


def _counts(copy: HostCopy, topology: Topology) -> np.ndarray:
    """The counts of experts without the headers, int32 `[L, R, E, C]`."""
    counts_LRW = copy.counts_LRW.numpy()
    return counts_LRW[:, :, NUM_HEADER:].reshape(
        len(counts_LRW), topology.num_ranks, topology.num_experts, NUM_COUNTS
    )


def _low_rows(copy: HostCopy, rows_LEM: IntArray, topology: Topology) -> IntArray | None:
    """Rows of each rank that ran at low precision, `[L, R]`; None without the lever downgrade."""
    if copy.low_LE is None:
        return None
    return rank_rows(rows_LEM.sum(axis=2) * copy.low_LE.numpy(), topology.num_ranks)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _spans(log: PassLog, first: str, last: str) -> np.ndarray:
    spans = [
        marks[first].ms_until(marks[last])  # type: ignore[arg-type]
        if first in marks and last in marks
        else 0.0
        for marks in log.marks_L
    ]
    return np.array(spans)


def _balance_ms(log: PassLog) -> float:
    if log.observing is not None:
        begun, ended = log.observing
        return begun.ms_until(ended)  # type: ignore[arg-type]
    # Whoever comes first waits for the others in a layer's exchange, as it would in the dispatch:
    # only the fastest layer shows what is ours.
    spans_L = _spans(log, "dispatch", "balanced")
    return float(spans_L.min()) * len(spans_L)


def _rows_after(
    counts_LREC: np.ndarray, rows_LEM: IntArray, log: PassLog, topology: Topology
) -> IntArray:
    """Rows that each rank's experts receive, from the counts and the rule of the plan alone."""
    rows_LR = routed_rank_rows(rows_LEM, topology.num_ranks)
    if log.lever in (Lever.NONE, Lever.DOWNGRADE):
        return rows_LR
    policy = log.agreed.policy
    by_source = policy.scope is Scope.SOURCE
    num_groups = num_groups_of(topology, policy.level)
    sources = range(topology.num_ranks) if by_source else [0]
    capacity_S = np.array([group_capacity(topology, log.agreed, source) for source in sources])
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
