"""A calibration from a trace to a placement; reads files, writes none.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moelb.calibrate.importance import read_importance
from sglang_moelb.calibrate.traffic import calibrate_on, judge
from sglang_moelb.calibrate.types import Calibrated, CalibrateError, Checkpoint, Importance
from sglang_moelb.calibrate.wanda import importance_of, read_checkpoint
from sglang_moelb.controller.place_resident import ResidentLimits, place_resident
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    Origin,
    Placement,
    RankMemory,
    Sizes,
    check,
    memory_of,
)
from sglang_moelb.trace.reader import Trace
from sglang_moelb.types import IntArray, Topology

# Begin a part of the work with its name and size (None: not known); called after each piece.
Bars = Callable[[str, int | None], Callable[[], None]]
MAX_RANKS = 256
WANDA = "Wanda, activations derived from the checkpoint's norms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is asked for; `importance` is a file, or None for Wanda's; see `ResidentLimits`."""

    model: Path
    share: float
    num_slots: int
    budget_share: float
    keep_share: float
    importance: Path | None
    aim: str
    low_format: str
    num_ranks: int | None


def calibrate_trace(trace: Trace, wanted: Wanted, bars: Bars) -> tuple[Placement, IntArray]:
    """The placement, and the rows, [L, E], of the passes that it is judged by.

    Raises `CalibrateError`, `PlacementError` and `TraceError`.
    """
    topology = _topology(trace.header.topology, wanted.num_ranks)
    calibrated = calibrate_on(trace, wanted.share, bars("reading passes", None))
    checkpoint = _checkpoint(wanted, topology, bars)
    importance = _importance(wanted, checkpoint, calibrated, topology)
    limits = ResidentLimits(
        expert_bytes=checkpoint.expert_bytes,
        num_slots=min(wanted.num_slots, topology.num_experts - topology.experts_per_rank),
        budget_share=wanted.budget_share,
        keep_share=wanted.keep_share,
        aim=wanted.aim,
    )
    layers = place_resident(calibrated.rows_LE, importance.values_LE, topology, limits)
    tick = bars("judging the placement", calibrated.num_passes_read)
    expected, rows_LE = judge(trace, layers, topology, calibrated, wanted.share, tick)
    before, after = memory_of(layers, topology, checkpoint.expert_bytes)
    placement = Placement(
        schema=SCHEMA,
        version=VERSION,
        format=wanted.low_format,
        sizes=Sizes(
            num_layers=topology.num_layers,
            num_experts=topology.num_experts,
            num_ranks=topology.num_ranks,
            topk=topology.topk,
        ),
        expert_bytes=checkpoint.expert_bytes,
        layers=layers,
        memory=RankMemory(before=before, after=after),
        expected=expected,
        origin=Origin(
            trace=trace.files[0].parent.name if len(trace.files) > 1 else str(trace.files[0].name),
            num_passes=calibrated.num_passes,
            num_passes_read=calibrated.num_passes_read,
            importance=importance.measure,
            aim=wanted.aim,
            model=wanted.model.resolve().name,
        ),
    )
    check(placement)
    return placement, rows_LE


def _topology(traced: Topology, num_ranks: int | None) -> Topology:
    if num_ranks is None:
        return traced
    if not 2 <= num_ranks <= MAX_RANKS or traced.num_experts % num_ranks:
        fits = [n for n in range(2, MAX_RANKS + 1) if traced.num_experts % n == 0]
        raise CalibrateError(
            f"--ep {num_ranks}: must divide the {traced.num_experts} experts and be at most "
            f"{MAX_RANKS}: one of {', '.join(map(str, fits))}."
        )
    return replace(traced, num_ranks=num_ranks)


def _checkpoint(wanted: Wanted, topology: Topology, bars: Bars) -> Checkpoint:
    ticks: list[Callable[[], None]] = []
    checkpoint = read_checkpoint(
        wanted.model,
        low_format=wanted.low_format,
        score=wanted.importance is None,
        begun=lambda total: ticks.append(bars("reading experts", total)),
        tick=lambda: ticks[0](),
    )
    found = (checkpoint.num_layers, checkpoint.num_experts)
    if found != (topology.num_layers, topology.num_experts):
        raise CalibrateError(
            f"--model {wanted.model}: has {found[0]} MoE layers of {found[1]} experts, the trace "
            f"{topology.num_layers} of {topology.num_experts}. Give the model that was traced."
        )
    return checkpoint


def _importance(
    wanted: Wanted, checkpoint: Checkpoint, calibrated: Calibrated, topology: Topology
) -> Importance:
    if wanted.importance is not None:
        return read_importance(wanted.importance, topology)
    values_LE = importance_of(checkpoint.scores_LE, calibrated.rows_LE)
    return Importance(values_LE=values_LE, measure=WANDA)
