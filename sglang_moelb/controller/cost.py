"""What rows cost on this machine, fitted while serving, and how much of a step that is.

The experts of a layer take `fixed_ms + ms_per_row * rows` on a rank, and the layer waits for the
slowest rank. The fit is least squares with forgetting over the last passes. It is solved anew from
the window at each pass rather than updated recursively: the solution is the same, and a sample that
turns out to be an outlier (a compile in the very first pass) leaves no trace.

Shape letters: L MoE layers, R ranks, N samples, P passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

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


UNMEASURED = CostModel(fixed_ms=0.0, ms_per_row=0.0)
NOTHING_TOLD: Mapping[int, Mapping[int, float]] = MappingProxyType({})


def fit(
    loads: Sequence[PassLoad],
    before: CostModel = UNMEASURED,
    told: Mapping[int, Mapping[int, float]] = NOTHING_TOLD,
) -> CostModel:
    """Fit the cost of experts to the window, oldest pass first.

    To this rank's layers one by one and, where their times are `told` by pass and rank, to the
    means over layers of other ranks, which count for as many layers: where this rank always has
    few rows, only the others say what many cost.

    Layers in which any row ran at low precision or experts were copied are left out on all ranks,
    for those that did not run so have few rows, which do not say what many cost. Where no other
    layer is left, what was fitted `before` still holds, and if there is nothing before, layers with
    copies are better than none.
    Times that are not finite, 0 or outliers are ignored (`usable_times`). Where all samples have
    about the same rows, or the slope would not be positive, all time is put on the rows; where the
    fixed part would be negative, it is 0. Runs on the host. Ours.
    """
    recent = loads[-FIT_PASSES:]
    if not recent:
        return before
    rows_N = np.concatenate([load.my_rows_L for load in recent])
    ms_N = np.concatenate([load.record.experts_ms_L for load in recent])
    low_N = np.concatenate([load.low_L for load in recent])
    copied_N = np.concatenate([load.copied_L for load in recent])
    weight_N = _weights(len(recent), len(rows_N) // len(recent))
    if told:
        others_3 = _others(recent, told)
        rows_N, ms_N, weight_N = (
            np.concatenate(pair) for pair in zip((rows_N, ms_N, weight_N), others_3, strict=True)
        )
        low_N, copied_N = (np.pad(one_N, (0, len(others_3[0]))) for one_N in (low_N, copied_N))
    usable_N = usable_times(ms_N, rows_N) & ~low_N
    plain_N = usable_N & ~copied_N
    if plain_N.any() or before.ms_per_row > 0.0:
        usable_N = plain_N
    if not usable_N.any():
        return before
    if not usable_N.all():
        rows_N, ms_N, weight_N = rows_N[usable_N], ms_N[usable_N], weight_N[usable_N]
    return _solve(rows_N, ms_N, weight_N / weight_N.sum())


def step_times(
    loads: Sequence[PassLoad], cost: CostModel, *, copy_ms: float = 0.0
) -> StepTimes:
    """Measured steps, with the time that a lever saved in them put back and its own taken out.

    Each copy to the rank that received most in a layer took `copy_ms`.

    So a lever that works does not make its own reason disappear. Passes whose step time is not
    finite, 0 or an outlier for its tokens are left out. Runs on the host. Ours.
    """
    own_P = np.array([load.record.balance_ms for load in loads], dtype=np.float64)
    ms_P = np.array([load.record.step_ms for load in loads], dtype=np.float64) - own_P
    timed_P = usable_times(ms_P, np.array([load.num_tokens for load in loads], dtype=np.int64))
    before_P = np.array([load.slowest_rows for load in loads], dtype=np.int64)
    run_P = np.array([load.slowest_rows_run for load in loads], dtype=np.int64)
    num_layers = len(loads[0].balance_L) * int(np.count_nonzero(timed_P)) if loads else 0
    before_rows, run_rows = int(before_P[timed_P].sum()), int(run_P[timed_P].sum())
    moe_ms = cost.fixed_ms * num_layers + cost.ms_per_row * before_rows
    copies_P = np.array([load.num_copies for load in loads], dtype=np.int64)
    base_ms = float(ms_P[timed_P].sum()) + cost.ms_per_row * (before_rows - run_rows)
    base_ms -= copy_ms * int(copies_P[timed_P].sum())
    return StepTimes(base_ms=max(base_ms, moe_ms), moe_ms=moe_ms, timed_P=timed_P)


def _others(
    recent: Sequence[PassLoad], told: Mapping[int, Mapping[int, float]]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean rows and ms of a layer, and weights, of other ranks without low rows or copies."""
    samples = []
    for age, load in enumerate(reversed(recent)):
        if load.low_L.any() or load.copied_L.any():
            continue
        num_layers = len(load.rows_L)
        for rank, experts_ms in told.get(load.record.step, {}).items():
            rows = load.record.rows_after_LR[:, rank].mean()
            samples.append((rows, experts_ms / num_layers, num_layers * FORGETTING**age))
    rows_N, ms_N, weight_N = np.array(samples, dtype=np.float64).reshape(-1, 3).T
    return rows_N, ms_N, weight_N


@lru_cache(maxsize=2 * FIT_PASSES)
def _weights(num_passes: int, num_layers: int) -> FloatArray:
    age_P = np.arange(num_passes, dtype=np.float64)[::-1]
    weight_N: FloatArray = np.repeat(FORGETTING**age_P, num_layers)
    return weight_N


def _solve(rows_N: FloatArray, ms_N: FloatArray, weight_N: FloatArray) -> CostModel:
    """Weighted least squares; the weights add up to 1."""
    mean_rows = float(weight_N @ rows_N)
    mean_ms = float(weight_N @ ms_N)
    apart_N = rows_N - mean_rows
    weighted_N = weight_N * apart_N
    variance = float(weighted_N @ apart_N)
    through_origin = CostModel(fixed_ms=0.0, ms_per_row=mean_ms / mean_rows)
    if variance <= (MIN_SPREAD * mean_rows) ** 2:
        return through_origin
    slope = float(weighted_N @ (ms_N - mean_ms)) / variance
    fixed_ms = mean_ms - slope * mean_rows
    if slope <= 0.0 or fixed_ms < 0.0:
        return through_origin
    return CostModel(fixed_ms=fixed_ms, ms_per_row=slope)
