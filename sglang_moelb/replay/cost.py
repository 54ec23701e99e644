"""What a pass takes on a machine, and how the constants of the default machine were fitted.

A layer takes `fixed_ms + ms_per_row` times the rows of its busiest rank, plus dispatch and combine
for each token of the rank with most of them; attention and the rest are paid by token too::

    layer_ms = fixed_ms + ms_per_row * max_r rows_r + exchange_ms_per_token * tokens
    step_ms  = sum over layers of (layer_ms + rest_ms_per_token * tokens)

Low precision divides the rows of a rank by `low_speedup`. That, and free peers' rules (planning and
copies of weights fully hidden), are assumptions in favour of the peers; ours pay the time measured.

Shape letters: P passes, L MoE layers, R EP ranks, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import msgspec
import numpy as np

from sglang_moelb.replay.types import Outcome, ReplayError
from sglang_moelb.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Constants of the cost model, in milliseconds; `own_ms` is a layer's own time by `Lever`.

    The defaults are 4 H100 of one host, experts of Qwen3-30B-A3B (2048 x 768) in bf16: `fit` of
    benchmarks/results/prefill_h100x4_20261122_18fd9dd.jsonl. They hold where the device is the
    bottleneck; at 1,024 tokens a rank that server waited for its host. Of replicate it is what was
    exposed on two H100 of one host, copies included; of downgrade, which was not told apart there,
    drop's.
    """

    fixed_ms: float = 0.1572
    ms_per_row: float = 1.8672e-5
    exchange_ms_per_token: float = 1.9927e-4
    rest_ms_per_token: float = 2.6269e-4
    low_speedup: float = 1.6
    own_ms: tuple[float, float, float, float, float] = (0.003, 0.49, 0.118, 0.118, 0.15)

    def effective_rows(self, outcome: Outcome) -> FloatArray:
        """Rows as the time they take at full precision, float64 [P, L, R]."""
        rows_PLR = outcome.rows_PLR.astype(np.float64)
        if outcome.low_PLR is None:
            return rows_PLR
        faster_PLR: FloatArray = np.where(
            outcome.low_PLR > 0, rows_PLR / self.low_speedup, rows_PLR
        )
        return faster_PLR

    def layer_ms(self, max_rows_PL: FloatArray, tokens_P: IntArray) -> FloatArray:
        """Time of each layer from before dispatch to after combine, [P, L]."""
        took_PL: FloatArray = (
            self.fixed_ms
            + self.ms_per_row * max_rows_PL
            + self.exchange_ms_per_token * tokens_P[:, None]
        )
        return took_PL

    def step_ms(self, max_rows_PL: FloatArray, tokens_P: IntArray) -> FloatArray:
        """Time of each pass, [P]."""
        rest_P = self.rest_ms_per_token * tokens_P * max_rows_PL.shape[1]
        took_P: FloatArray = self.layer_ms(max_rows_PL, tokens_P).sum(axis=1) + rest_P
        return took_P

    def own_step_ms(self, outcome: Outcome) -> FloatArray:
        """What observing, planning and applying take of each pass: [P], 0 for rules of others."""
        num_passes, num_layers = outcome.rows_PLR.shape[:2]
        if outcome.levers_P is None:
            return np.zeros(num_passes)
        own_P: FloatArray = np.array(self.own_ms)[outcome.levers_P] * num_layers
        return own_P


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A measured prefill pass: sums over its layers, rows in units of the mean rank's."""

    num_layers: int
    num_tokens: int  # of the busiest rank
    mean_rows: float  # of a rank and layer
    my_rows: float  # of the rank whose times these are, over all layers
    max_rows: float  # of the busiest rank, over all layers
    experts_ms: float
    layer_ms: float
    step_ms: float
    balance_ms: float


def machine_of(constants: Mapping[str, Any]) -> Machine:
    """The machine with these constants, plain JSON types, and defaults for the others.

    Raises `ReplayError` that names the constant.
    """
    try:
        machine = msgspec.convert(dict(constants), Machine)
    except msgspec.ValidationError as error:
        raise ReplayError(f"--machine: {error}") from error
    known = [one.name for one in fields(Machine)]
    for name, value in constants.items():
        if name not in known:
            raise ReplayError(f"--machine: no constant {name!r}; there are {', '.join(known)}")
        least = 1.0 if name == "low_speedup" else 0.0
        if not all(least <= one < math.inf for one in np.ravel(value)):
            raise ReplayError(f"--machine: {name} is {value}; it must be at least {least:g}")
    return machine


def measured(rows: Sequence[Mapping[str, Any]], topk: int = 8) -> list[Measured]:
    """The timed passes without expansion in rows of `benchmarks.gpu.bench_prefill`.

    In them one rank, in turn by layer, has `skew` times the mean rows and the others share the
    rest, so a rank's rows follow from skew and capacity alone.
    """
    found = []
    for row in rows:
        one = row.get("pass") or {}
        if not one.get("experts_ms") or one["lever"] not in ("none", "drop"):
            continue
        factor = float(row["mode"].partition("@")[2] or "inf") if one["lever"] == "drop" else np.inf
        tokens_R = one["num_tokens_R"]
        num_layers, num_ranks = len(one["balance_before_L"]), len(tokens_R)
        mean_rows = sum(tokens_R) * topk / num_ranks
        hot, cold = min(row["skew"], factor), (num_ranks - row["skew"]) / (num_ranks - 1)
        hot_layers = num_layers / num_ranks
        found.append(
            Measured(
                num_layers=num_layers,
                num_tokens=max(tokens_R),
                mean_rows=mean_rows,
                my_rows=mean_rows * (hot_layers * hot + (num_layers - hot_layers) * cold),
                max_rows=mean_rows * num_layers * max(hot, cold),
                experts_ms=one["experts_ms"],
                layer_ms=one["layer_ms"],
                step_ms=one["step_ms"],
                balance_ms=one["balance_ms"],
            )
        )
    return found


def fit(passes: Sequence[Measured]) -> Machine:
    """The machine that made `passes`; constants of which nothing is measured keep the default.

    Least squares of the experts' time over the rank's own rows (drops change them), then medians of
    what is left of the layer's and the step's time. Ours.
    """
    design_N2 = np.array([[one.num_layers, one.my_rows] for one in passes])
    ms_N = np.array([one.experts_ms for one in passes])
    (fixed_ms, ms_per_row), *_ = np.linalg.lstsq(design_N2, ms_N, rcond=None)

    def left(one: Measured) -> float:
        return one.layer_ms - one.num_layers * float(fixed_ms) - float(ms_per_row) * one.max_rows

    per_token = [left(one) / (one.num_layers * one.num_tokens) for one in passes]
    rest = [(one.step_ms - one.layer_ms) / (one.num_layers * one.num_tokens) for one in passes]
    return Machine(
        fixed_ms=float(fixed_ms),
        ms_per_row=float(ms_per_row),
        exchange_ms_per_token=median(per_token),
        rest_ms_per_token=median(rest),
    )


def layer_error(machine: Machine, one: Measured) -> float:
    """Predicted over measured time of a pass's layers, less 1."""
    max_rows_PL = np.full((1, one.num_layers), one.max_rows / one.num_layers)
    predicted_ms = float(machine.layer_ms(max_rows_PL, np.array([one.num_tokens])).sum())
    return predicted_ms / one.layer_ms - 1.0
