"""What a replay found, as one JSON document.

Shape letters: P passes, L MoE layers.
"""

from __future__ import annotations

import msgspec
import numpy as np

from sglang_moelb.replay.arms import ARMS, Options
from sglang_moelb.replay.controlled import Fidelity
from sglang_moelb.replay.run import Replayed
from sglang_moelb.replay.types import Scores
from sglang_moelb.trace.reader import Trace
from sglang_moelb.types import FloatArray

MAX_POINTS = 200


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """One arm; balance is max/mean over ranks, over all passes and layers unless said.

    `saved_share` is of the predicted step of arm none; `balance_by_layer` the mean over passes,
    `balance_over_time` the mean over layers of each of at most MAX_POINTS stretches of passes.
    """

    name: str
    title: str
    exact: bool
    balance_mean: float
    balance_p95: float
    balance_worst_layer: float
    worst_layer: int
    peak_mean: float
    lost_row_share: float
    low_precision_share: float
    step_ms: float
    saved_share: float
    balance_by_layer: list[float]
    balance_over_time: list[float]


class ModelError(msgspec.Struct, frozen=True, kw_only=True):
    """Cost model against the measured times of the trace: medians of predicted / measured - 1."""

    num_passes: int
    step_median: float
    layers_median: float
    layers_p95_absolute: float


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    trace: str
    source: str
    num_layers: int
    num_experts: int
    num_ranks: int
    traced_ranks: int
    topk: int
    num_passes: int
    num_prefill_passes: int
    machine: dict[str, float | list[float]]
    arms: list[ArmResult]
    model_error: ModelError | None
    num_decisions: int
    num_same_decisions: int
    num_missed_passes: int
    first_difference: str
    verdict: str


def summarise(
    trace: Trace, options: Options, replayed: Replayed, fidelity: Fidelity, verdict: str
) -> ReplayResult:
    """The result of a replay; the first arm is what the others are compared with."""
    base_ms = float(replayed.scores[0].step_ms_P.mean())
    header, machine = trace.header, options.machine
    return ReplayResult(
        trace=str(trace.files[0].parent if len(trace.files) > 1 else trace.files[0]),
        source=header.source,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        num_ranks=options.topology.num_ranks,
        traced_ranks=header.num_ranks,
        topk=header.topk,
        num_passes=replayed.num_passes,
        num_prefill_passes=len(replayed.scores[0].step_ms_P),
        machine={
            "fixed_ms": machine.fixed_ms,
            "ms_per_row": machine.ms_per_row,
            "exchange_ms_per_token": machine.exchange_ms_per_token,
            "rest_ms_per_token": machine.rest_ms_per_token,
            "low_speedup": machine.low_speedup,
            "own_ms": list(machine.own_ms),
        },
        arms=[_arm(scores, base_ms) for scores in replayed.scores],
        model_error=_model_error(replayed),
        num_decisions=fidelity.num_decisions,
        num_same_decisions=fidelity.num_same,
        num_missed_passes=fidelity.num_missed,
        first_difference=fidelity.first_difference,
        verdict=verdict,
    )


def stretch(num_passes: int) -> int:
    """How many passes one point over time stands for."""
    return -(-num_passes // MAX_POINTS)


def _arm(scores: Scores, base_ms: float) -> ArmResult:
    layer_L = scores.balance_PL.mean(axis=0)
    step_ms = float(scores.step_ms_P.mean())
    return ArmResult(
        name=scores.name,
        title=ARMS[scores.name].title,
        exact=scores.exact,
        balance_mean=float(scores.balance_PL.mean()),
        balance_p95=float(np.percentile(scores.balance_PL, 95)),
        balance_worst_layer=float(layer_L.max()),
        worst_layer=int(layer_L.argmax()),
        peak_mean=float(scores.peak_PL.mean()),
        lost_row_share=float(scores.lost_share_P.mean()),
        low_precision_share=float(scores.low_share_P.mean()),
        step_ms=step_ms,
        saved_share=1.0 - step_ms / base_ms,
        balance_by_layer=_rounded(layer_L),
        balance_over_time=_rounded(_stretches(scores.balance_PL.mean(axis=1))),
    )


def _model_error(replayed: Replayed) -> ModelError | None:
    if not len(replayed.step_error_P):
        return None
    return ModelError(
        num_passes=len(replayed.step_error_P),
        step_median=float(np.median(replayed.step_error_P)),
        layers_median=float(np.median(replayed.layer_error_P)),
        layers_p95_absolute=float(np.percentile(np.abs(replayed.layer_error_P), 95)),
    )


def _stretches(values_P: FloatArray) -> FloatArray:
    size = stretch(len(values_P))
    return np.array([values_P[at : at + size].mean() for at in range(0, len(values_P), size)])


def _rounded(values: FloatArray) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
