"""What each lever would have spared and lost, sample by sample, over a long window of passes.

A sample is a forecast of all levers over the passes since the sample before it, with the cost model
of that time, taken where the controller forecasts anyway and at most every SAMPLE_S. It stands for
all prefill passes since then: where more of them came than the controller's window holds, the
newest speak for the others. Passes too small for a lever count with their time and no gain; decode
passes are not recorded, so they count in nothing.

Shape letters: V levers, P passes of the controller's window, R ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_moelb.controller.cost import CostModel, StepTimes
from sglang_moelb.controller.load import PassLoad, usable_times
from sglang_moelb.controller.project_downgrade import Projection
from sglang_moelb.types import Lever, LeverForecast, StepRecord

SAMPLE_S = 0.5
SETTLE_PASSES = 8  # before these, a compile cannot be told from a pass
NUM_SMALL = 32
NUM_OWN, MIN_OWN = 33, 5  # samples from which a lever's own time is told; the first may compile

Projections = Sequence[tuple[Projection, ...]]
Forecast = Callable[[Sequence[PassLoad], Projections, StepTimes], tuple[LeverForecast, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The passes since the sample before, as if no lever had acted and none took time itself.

    `prefill_ms` is of all of them, the small ones too; `spared_ms_V` counts as far as perfect
    balance would have brought it, because a lossy lever also spares time by doing less.
    """

    num_passes: int
    num_small: int
    num_tokens: float
    prefill_ms: float
    spared_ms_V: tuple[float, ...]
    lost_share_V: tuple[float, ...]
    low_share_V: tuple[float, ...]


class Scoreboard:
    """Collects samples of the last `window_passes` prefill passes that were large enough."""

    def __init__(self, window_passes: int) -> None:
        self._window_passes = window_passes
        self._own: dict[Lever, deque[float]] = {}
        self._samples: deque[Sample] = deque()
        self._num_passes = 0  # in the samples
        self._levers: tuple[Lever, ...] = ()
        self._sampled_s = -math.inf
        self._num_seen = 0
        self._num_new = 0  # since the last sample
        self._num_new_small = 0
        self._small: deque[tuple[float, int]] = deque(maxlen=NUM_SMALL)

    @property
    def samples(self) -> Sequence[Sample]:
        """Oldest first."""
        return self._samples

    @property
    def levers(self) -> tuple[Lever, ...]:
        """What the columns V of the samples are."""
        return self._levers

    @property
    def num_passes(self) -> int:
        """Passes large enough for a lever that the samples stand for."""
        return self._num_passes

    def own_ms(self, lever: Lever) -> float:
        """Median of what passes under `lever` took themselves, 0 where too few are known.

        It is of the newest pass of each sample. NONE stands for passes without a lever: what
        counting takes.
        """
        known = self._own.get(lever, ())
        return float(np.median(known)) if len(known) >= MIN_OWN else 0.0

    def cleared(self) -> Scoreboard:
        """A board without samples that knows the levers' own times."""
        board = Scoreboard(self._window_passes)
        board._own = self._own
        return board

    def resize(self, window_passes: int) -> None:
        """Hold another number of passes from the next sample on."""
        self._window_passes = window_passes

    def see(self, record: StepRecord, *, entered: bool) -> None:
        """Count a prefill pass; `entered` says whether it is large enough for a lever."""
        if entered:
            self._num_seen += 1
            self._num_new += 1
        elif record.phase == "prefill":
            num_tokens = sum(record.num_tokens_R.tolist())
            self._small.append((record.step_ms - record.balance_ms, num_tokens))
            self._num_new_small += 1

    def sample(
        self,
        loads: Sequence[PassLoad],
        projections: Projections,
        *,
        cost: CostModel,
        steps_of: Callable[[Sequence[PassLoad]], StepTimes],
        forecast: Forecast,
        now_s: float,
    ) -> None:
        """Take a sample if one is due and anything can be told.

        Args:
            loads: the controller's window, oldest first; it has just been forecast.
            projections: those of `loads`.
            cost: what rows cost, fitted to `loads`; nothing is sampled while it is not known.
            steps_of: the steps of passes.
            forecast: forecasts all levers over given passes, their own time left out.
            now_s: the time.
        """
        known = cost.ms_per_row > 0.0 and self._num_seen >= SETTLE_PASSES
        if not known or now_s - self._sampled_s < SAMPLE_S:
            return
        first = len(loads) - min(self._num_new, len(loads))
        timed_P = steps_of(loads).timed_P
        at_P = [at for at in range(first, len(loads)) if timed_P[at]]
        if not at_P:
            return
        chosen = [loads[at] for at in at_P]
        steps = steps_of(chosen)
        if steps.base_ms <= 0.0:
            return
        forecasts = forecast(chosen, [projections[at] for at in at_P], steps)
        levers = tuple(one.lever for one in forecasts)
        if levers != self._levers:
            self._samples.clear()
            self._num_passes, self._levers = 0, levers
        self._append(chosen, steps, forecasts)
        self._learn_own(chosen[-1].record)
        self._sampled_s = now_s

    def _append(
        self, loads: Sequence[PassLoad], times: StepTimes, forecasts: Sequence[LeverForecast]
    ) -> None:
        num_timed = int(np.count_nonzero(times.timed_P))
        base_ms = times.base_ms * self._num_new / num_timed
        mean_balance = math.fsum([load.mean_balance for load in loads]) / len(loads)
        bound = times.moe_share * (1.0 - 1.0 / mean_balance)
        self._samples.append(
            Sample(
                num_passes=self._num_new,
                num_small=self._num_new_small,
                num_tokens=sum(load.num_tokens for load in loads) * self._num_new / len(loads),
                prefill_ms=base_ms + self._small_ms(),
                spared_ms_V=tuple(min(one.gain, bound) * base_ms for one in forecasts),
                lost_share_V=tuple(one.lost_mass_share for one in forecasts),
                low_share_V=tuple(one.low_share for one in forecasts),
            )
        )
        self._num_passes += self._num_new
        self._num_new = self._num_new_small = 0
        while self._num_passes > self._window_passes and len(self._samples) > 1:
            self._num_passes -= self._samples.popleft().num_passes

    def _learn_own(self, record: StepRecord) -> None:
        if 0.0 < record.balance_ms < math.inf:
            own = self._own.setdefault(record.used_lever, deque(maxlen=NUM_OWN))
            own.append(record.balance_ms)

    def _small_ms(self) -> float:
        """Time of the small passes since the last sample; compiles count as the others."""
        if not self._num_new_small:
            return 0.0
        ms_P, tokens_P = np.array(self._small, dtype=np.float64).T
        newest = slice(-min(self._num_new_small, len(ms_P)), None)
        usable_P = usable_times(ms_P, tokens_P)[newest]
        if not usable_P.any():
            return 0.0
        return float(ms_P[newest][usable_P].mean()) * self._num_new_small
