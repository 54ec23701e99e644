"""What rows cost on this machine, fitted while serving, and how much of a step that is.

The experts of a layer take `fixed_ms + ms_per_row * rows` on a rank, and the layer waits for the
slowest rank. The fit is least squares with forgetting over the last passes. It is solved anew from
the window at each pass rather than updated recursively: the solution is the same, and a sample that
turns out to be an outlier (a compile in the very first pass) leaves no trace.

Shape letters: L MoE layers, R ranks, N samples, P passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_moelb.controller.load import BoolArray, PassLoad, usable_times
from sglang_moelb.types import FloatArray

FIT_PASSES = 64  # older passes would weigh under 4 % of the newest
FORGETTING = 0.95  # weight of a pass relative to the one after it
MIN_SPREAD = 1e-3  # standard deviation / mean of rows below which a slope cannot be told


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Time of the experts of one layer on one rank; both are 0 where nothing was measured."""

    fixed_ms: float
    ms_per_row: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Steps of the window whose times can be used, as they would have been with no lever.

    `base_ms` is the time of all of them, `moe_ms` what the experts of the slowest rank take of it,
    `timed_P` which passes of the window they are.
    """

    base_ms: float
    moe_ms: float
    timed_P: BoolArray

    @property
    def moe_share(self) -> float:
        """Share of a step spent in the experts of the slowest rank, in [0, 1]."""
        return self.moe_ms / self.base_ms if self.base_ms > 0 else 0.0


def fit(loads: Sequence[PassLoad]) -> CostModel:
    """Fit the cost of this rank's experts to the window, oldest pass first.

    Times that are not finite, 0 or outliers are ignored (`usable_times`). Where all samples have
    about the same rows, or the slope would not be positive, all time is put on the rows; where the
    fixed part would be negative, it is 0. Runs on the host. Ours.
    """
    recent = loads[-FIT_PASSES:]
    if not recent:
        return CostModel(fixed_ms=0.0, ms_per_row=0.0)
    rows_N = np.concatenate([_my_rows(load) for load in recent])
    ms_N = np.concatenate([load.record.experts_ms_L for load in recent])
    age_N = np.repeat(np.arange(len(recent))[::-1], [len(_my_rows(load)) for load in recent])
    usable_N = usable_times(ms_N, rows_N)
    if not usable_N.any():
        return CostModel(fixed_ms=0.0, ms_per_row=0.0)
    weight_N: FloatArray = FORGETTING ** age_N[usable_N].astype(np.float64)
    return _solve(rows_N[usable_N], ms_N[usable_N], weight_N)


def step_times(loads: Sequence[PassLoad], cost: CostModel) -> StepTimes:
    """Measured steps, with the time that a lever saved in them put back.

    So a lever that works does not make its own reason disappear. Passes whose step time is not
    finite, 0 or an outlier for its tokens are left out. Runs on the host. Ours.
    """
    ms_P = np.array([load.record.step_ms for load in loads], dtype=np.float64)
    timed_P = usable_times(ms_P, np.array([load.num_tokens for load in loads], dtype=np.int64))
    before_P = np.array([load.slowest_rows for load in loads], dtype=np.int64)
    run_P = np.array([load.slowest_rows_run for load in loads], dtype=np.int64)
    num_layers = sum(
        len(load.balance_L) for load, timed in zip(loads, timed_P, strict=True) if timed
    )
    moe_ms = cost.fixed_ms * num_layers + cost.ms_per_row * float(before_P[timed_P].sum())
    saved_ms = cost.ms_per_row * float((before_P - run_P)[timed_P].sum())
    base_ms = float(ms_P[timed_P].sum()) + saved_ms
    return StepTimes(base_ms=max(base_ms, moe_ms), moe_ms=moe_ms, timed_P=timed_P)


def _my_rows(load: PassLoad) -> FloatArray:
    return load.record.rows_after_LR[:, load.record.rank].astype(np.float64)


def _solve(rows_N: FloatArray, ms_N: FloatArray, weight_N: FloatArray) -> CostModel:
    mean_rows = float(np.average(rows_N, weights=weight_N))
    mean_ms = float(np.average(ms_N, weights=weight_N))
    apart_N = rows_N - mean_rows
    variance = float(np.average(apart_N**2, weights=weight_N))
    through_origin = CostModel(fixed_ms=0.0, ms_per_row=mean_ms / mean_rows)
    if variance <= (MIN_SPREAD * mean_rows) ** 2:
        return through_origin
    slope = float(np.average(apart_N * (ms_N - mean_ms), weights=weight_N)) / variance
    fixed_ms = mean_ms - slope * mean_rows
    if slope <= 0.0 or fixed_ms < 0.0:
        return through_origin
    return CostModel(fixed_ms=fixed_ms, ms_per_row=slope)
