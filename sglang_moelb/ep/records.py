"""The log of a pass on the hot path, and its counts on their way to the controller.

`PassLog` is filled with device tensors and marks only. When a pass ends, its counts are copied
once, asynchronously on CUDA, to memory that the controller reads; once the device has ended the
pass, `raw_of` says the rest. `ep.build_record` makes the `StepRecord`.

Shape letters: T rows of this rank, L MoE layers, R ranks, E logical experts, W width of a row of
counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.ep.balance import LayerOutcome
from sglang_moelb.ep.clock import DeviceMark, HostMark, mark_on
from sglang_moelb.ep.controller_messages import RawPass
from sglang_moelb.ep.low.plan import LowPlan
from sglang_moelb.ep.replicas.plan import CopyPlan, told_of
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.types import Lever

AnyMark = HostMark | DeviceMark
PARTS = ("dispatch", "balanced", "experts", "combine", "combined")


Marks = dict[str, AnyMark]


@dataclass(slots=True)
class PassLog:
    """One pass on the hot path; a layer has an outcome or plan where a lever acts, else its ids.

    `marks_L` holds the marks of a layer's parts, in the order of `PARTS`, where `timed`, else none.
    `tokens_L` holds the router's ids and weights where `ep.token_trace` samples the pass.
    """

    step: int
    agreed: Agreed
    lever: Lever
    gate_reason: str
    begun: AnyMark
    timed: bool
    flags_T: torch.Tensor | None  # of the batch's rows
    ids_L: list[torch.Tensor] = field(default_factory=list)
    outcomes_L: list[LayerOutcome] = field(default_factory=list)
    plans_L: list[LowPlan] = field(default_factory=list)
    copies_L: list[CopyPlan] = field(default_factory=list)
    marks_L: list[Marks] = field(default_factory=list)
    observing: AnyMark | None = None  # when all layers' counting began, without a lever
    tokens_L: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # of a sampled pass
    stream: torch.cuda.Stream | None = None  # of the pass, where on CUDA; for its times


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Host memory of a pass: int64 stats `[R, 8]`, the rest int32 as in `SharedCounts`."""

    number: int
    counts_RLW: torch.Tensor
    stats_R8: torch.Tensor
    low_LE: torch.Tensor
    copied_LR2: torch.Tensor


def slots_of(shared: SharedCounts) -> list[Slot]:
    """The slots of `shared` as tensors of the same memory."""
    parts = zip(
        shared.counts_SRLW, shared.stats_SR8, shared.low_SLE, shared.copied_SLR2, strict=True
    )
    return [
        Slot(
            number=number,
            counts_RLW=torch.from_numpy(counts_RLW),
            stats_R8=torch.from_numpy(stats_R8),
            low_LE=torch.from_numpy(low_LE),
            copied_LR2=torch.from_numpy(copied_LR2),
        )
        for number, (counts_RLW, stats_R8, low_LE, copied_LR2) in enumerate(parts)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedPass:
    """A pass whose last work is enqueued; its counts are in slot `slot` once it has ended."""

    log: PassLog
    slot: int
    ended: AnyMark
    low_LE: torch.Tensor | None = None


def close(
    log: PassLog, counts_RLW: torch.Tensor, stats_R8: torch.Tensor | None, slot: Slot
) -> ClosedPass:
    """End the pass: copy its counts, and what a lever did, to `slot`; no host sync on CUDA.

    The log lets go of its device tensors.
    """
    assert counts_RLW.shape == slot.counts_RLW.shape, (counts_RLW.shape, slot.counts_RLW.shape)
    slot.counts_RLW.copy_(counts_RLW, non_blocking=True)
    if stats_R8 is not None:
        slot.stats_R8.copy_(stats_R8, non_blocking=True)
    if log.plans_L:
        low_LE = torch.stack([plan.low_E for plan in log.plans_L])
        slot.low_LE.copy_(low_LE, non_blocking=True)
    if log.copies_L:
        slot.copied_LR2.copy_(told_of(log.copies_L), non_blocking=True)
    log.ids_L, log.outcomes_L, log.plans_L, log.copies_L, log.tokens_L = [], [], [], [], None
    return ClosedPass(log=log, slot=slot.number, ended=mark_on(counts_RLW.device))


def raw_of(closed: ClosedPass, now_s: float) -> RawPass:
    """What is to be told of a pass that the device has ended; `now_s` as in `RawPass`.

    Once for each pass: its marks are given back.
    """
    log = closed.log
    raw = RawPass(
        slot=closed.slot,
        now_s=now_s,
        step=log.step,
        agreed=log.agreed,
        lever=log.lever,
        gate_reason=log.gate_reason,
        experts_ms_L=_spans(closed, "experts", "combine"),
        layer_ms_L=_spans(closed, "dispatch", "combined"),
        balance_ms=_balance_ms(closed),
        step_ms=log.begun.ms_until(closed.ended),  # type: ignore[arg-type]
    )
    for mark in _marks_of(closed):
        mark.give_back()
    return raw


def _marks_of(closed: ClosedPass) -> Iterator[AnyMark]:
    log = closed.log
    yield from (log.begun, closed.ended)
    if log.observing is not None:
        yield log.observing
    for marks in log.marks_L:
        yield from marks.values()


def _spans(closed: ClosedPass, first: str, last: str) -> list[float]:
    return [
        marks[first].ms_until(marks[last])  # type: ignore[arg-type]
        if first in marks and last in marks
        else 0.0
        for marks in closed.log.marks_L
    ]


def _balance_ms(closed: ClosedPass) -> float:
    if closed.log.observing is not None:
        return closed.log.observing.ms_until(closed.ended)  # type: ignore[arg-type]
    # Whoever comes first waits for the others in a layer's exchange, as it would in the dispatch:
    # only the fastest layer shows what is ours.
    spans_L = _spans(closed, "dispatch", "balanced")
    return min(spans_L) * len(spans_L)
