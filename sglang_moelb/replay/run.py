"""Drives arms over a trace, some passes at a time, and scores what they leave.

Shape letters: P passes, L MoE layers, R EP ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sglang_moelb.replay.arms import ARMS, Options
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.types import Counts, Outcome, ReplayError, Scores
from sglang_moelb.trace.reader import Trace
from sglang_moelb.trace.types import TracedPass
from sglang_moelb.types import FloatArray, IntArray, Topology

MAX_PASSES_AT_ONCE = 64
MAX_BYTES_AT_ONCE = 64 << 20
MAX_RANKS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """The scores of all arms, in order, and how far the cost model was off the times measured.

    `step_error_P` and `layer_error_P` are predicted over measured less 1, of the passes whose times
    the trace has and whose EP size is the replay's.
    """

    scores: tuple[Scores, ...]
    step_error_P: FloatArray
    layer_error_P: FloatArray
    num_passes: int  # of the trace, those without a prefill included


def topology_at(trace: Trace, num_ranks: int | None) -> Topology:
    """The trace's sizes at another EP size. Raises `ReplayError` if it does not fit."""
    topology = trace.header.topology
    if num_ranks is None:
        return topology
    if not 1 <= num_ranks <= MAX_RANKS or topology.num_experts % num_ranks:
        fits = [n for n in range(1, MAX_RANKS + 1) if topology.num_experts % n == 0]
        raise ReplayError(
            f"--ep {num_ranks}: must divide the {topology.num_experts} experts and be at most "
            f"{MAX_RANKS}: one of {', '.join(map(str, fits))}."
        )
    return replace(topology, num_ranks=num_ranks)


def replay_trace(trace: Trace, names: Sequence[str], options: Options) -> Replayed:
    """Score the arms `names` over all prefill passes of `trace`.

    Raises `ReplayError` where there is none, `TraceError` for a trace that cannot be read.
    """
    rules = {name: ARMS[name].make(options) for name in names}
    parts: dict[str, list[Scores]] = {name: [] for name in names}
    errors: list[tuple[float, float]] = []
    num_passes = 0
    for passes, num_read in _prefill(trace):
        num_passes += num_read
        if not passes:
            continue
        counts = _counts(passes, options.topology)
        for name, rule in rules.items():
            parts[name].append(score(name, counts, rule(counts), options.machine))
        if options.topology == trace.header.topology:
            errors += _model_errors(passes, options.machine)
    if not any(parts.values()):
        raise ReplayError(
            f"{trace.files[0]}: {num_passes} passes, none of them a prefill with tokens. Trace a "
            "server while it serves prompts."
        )
    error_P2 = np.array(errors).reshape(-1, 2)
    return Replayed(
        scores=tuple(_joined(parts[name]) for name in names),
        step_error_P=error_P2[:, 0],
        layer_error_P=error_P2[:, 1],
        num_passes=num_passes,
    )


def score(name: str, counts: Counts, outcome: Outcome, machine: Machine) -> Scores:
    """What an arm made of some passes."""
    takes_PLR = machine.effective_rows(outcome)
    max_PL, mean_PL = takes_PLR.max(axis=2), takes_PLR.mean(axis=2)
    before_PL = counts.rows_PLE.sum(axis=2)
    rows_P = np.maximum(before_PL.sum(axis=1), 1)
    mean_before_PL = np.maximum(before_PL / counts.num_ranks, 1e-9)
    none_P = np.zeros(len(counts))
    lost_P = none_P if outcome.lost_PL is None else outcome.lost_PL.sum(axis=1) / rows_P
    low_P = none_P if outcome.low_PLR is None else outcome.low_PLR.mean(axis=(1, 2))
    step_ms_P = machine.step_ms(max_PL, counts.busiest_tokens_P) + machine.own_step_ms(outcome)
    return Scores(
        name=name,
        exact=ARMS[name].exact,
        balance_PL=np.where(mean_PL > 0, max_PL / np.maximum(mean_PL, 1e-9), 1.0),
        peak_PL=np.where(before_PL > 0, max_PL / mean_before_PL, 1.0),
        lost_share_P=lost_P,
        low_share_P=low_P,
        step_ms_P=step_ms_P,
    )


def _prefill(trace: Trace) -> Iterator[tuple[list[TracedPass], int]]:
    """Prefill passes with tokens, some at a time, and how many passes were read for them."""
    sizes = trace.header.topology
    pass_bytes = 16 * sizes.num_layers * sizes.num_ranks * sizes.num_experts
    at_once = max(1, min(MAX_PASSES_AT_ONCE, MAX_BYTES_AT_ONCE // pass_bytes))
    held: list[TracedPass] = []
    num_read = 0
    for traced in trace.passes():
        num_read += 1
        if traced.record.phase == "prefill" and traced.rows_LREM.any():
            held.append(traced)
        if len(held) == at_once:
            yield held, num_read
            held, num_read = [], 0
    yield held, num_read


def _counts(passes: Sequence[TracedPass], topology: Topology) -> Counts:
    return Counts(
        rows_PLSEM=np.stack([one.rows_LREM for one in passes]),
        rows_PLEM=np.stack([one.record.rows_LEM for one in passes]),
        num_tokens_PS=np.stack([one.record.num_tokens_R for one in passes]),
        num_protected_P=np.array([one.record.num_protected_tokens_R.sum() for one in passes]),
        num_refused_P=np.array([one.record.num_refused_tokens_R.sum() for one in passes]),
        num_ranks=topology.num_ranks,
        topk=topology.topk,
    )


def _model_errors(passes: Sequence[TracedPass], machine: Machine) -> list[tuple[float, float]]:
    """Predicted over measured less 1, of step and layers, for passes whose times are known."""
    found = []
    for record in (one.record for one in passes):
        if not (record.step_ms > 0.0 and (record.layer_ms_L > 0.0).all()):
            continue
        max_rows_PL = record.rows_after_LR.max(axis=1)[None].astype(np.float64)
        tokens_P: IntArray = record.num_tokens_R.max(keepdims=True)
        step_ms = float(machine.step_ms(max_rows_PL, tokens_P)[0]) + record.balance_ms
        layer_ms = float(machine.layer_ms(max_rows_PL, tokens_P).sum()) + record.balance_ms
        measured_ms = float(record.layer_ms_L.sum())
        found.append((step_ms / record.step_ms - 1.0, layer_ms / measured_ms - 1.0))
    return found


def _joined(parts: Sequence[Scores]) -> Scores:
    def all_of(name: str) -> FloatArray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Scores(
        name=parts[0].name,
        exact=parts[0].exact,
        balance_PL=all_of("balance_PL"),
        peak_PL=all_of("peak_PL"),
        lost_share_P=all_of("lost_share_P"),
        low_share_P=all_of("low_share_P"),
        step_ms_P=all_of("step_ms_P"),
    )
