"""Gate mass: how much was lost of late, and how much a dropped row takes with it; and how many rows
ran at low precision, which lose no gate mass and have a budget of their own.

Passes are prefill passes of any size: nothing is ever dropped in decode, and its many passes
would flush the window within seconds. A mass that is not finite is ignored.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from sglang_moelb.types import Lever, Metric, StepRecord, Topology

DROP_PRIOR = {
    Metric.SCORE: 0.5,
    Metric.ORDER: 1.0,
    Metric.REVERSE: 1.0,
    Metric.RANDOM: 1.0,
}
LEVER_PRIOR = {Lever.DROP: 1.0, Lever.EXPAND: 0.5}
PRIOR_WEIGHT = 0.05  # dropped share of one pass that weighs as much as the prior
FORGETTING = 0.98


class QualityWindow:
    """Gate mass routed and lost, and rows at low precision, in the last `num_passes` prefills."""

    def __init__(self, num_passes: int) -> None:
        self._routed: deque[float] = deque(maxlen=num_passes)
        self._lost: deque[float] = deque(maxlen=num_passes)
        self._rows: deque[int] = deque(maxlen=num_passes)
        self._low_rows: deque[int] = deque(maxlen=num_passes)

    def add(self, record: StepRecord) -> None:
        """Count the pass if it is a prefill pass with tokens."""
        known = math.isfinite(record.routed_mass) and math.isfinite(record.lost_mass)
        if record.phase == "prefill" and known and record.routed_mass > 0.0:
            self._routed.append(record.routed_mass)
            self._lost.append(record.lost_mass)
            self._rows.append(int(record.rows_after_LR.sum()))
            low_LR = record.low_rows_LR
            self._low_rows.append(0 if low_LR is None else int(low_LR.sum()))

    def resized(self, num_passes: int) -> QualityWindow:
        """A window of another length that holds the newest passes of this one."""
        window = QualityWindow(num_passes)
        window._routed.extend(self._routed)
        window._lost.extend(self._lost)
        window._rows.extend(self._rows)
        window._low_rows.extend(self._low_rows)
        return window

    @property
    def spent_share(self) -> float:
        """Gate mass lost over the window as a share of what was routed; 0 with no passes."""
        routed = math.fsum(self._routed)
        return math.fsum(self._lost) / routed if routed else 0.0

    @property
    def low_share(self) -> float:
        """Rows that ran at low precision over the window as a share; 0 with no rows."""
        num_rows = sum(self._rows)
        return sum(self._low_rows) / num_rows if num_rows else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossModel:
    """Mass of a dropped row in units of the mean mass of a row, learned for each lever.

    Kept when a lever is off, so that a lever found too lossy is not tried again each window.
    `lost` and `dropped` are sums of shares over passes in which the lever acted, with forgetting.
    """

    lost: tuple[float, ...] = (0.0,) * len(Lever)
    dropped: tuple[float, ...] = (0.0,) * len(Lever)

    def mass_per_dropped_row(self, lever: Lever, metric: Metric) -> float:
        """Mean mass of a row that `lever` drops; the prior until it has been used."""
        prior = DROP_PRIOR[metric] * LEVER_PRIOR[lever]
        lost = prior * PRIOR_WEIGHT + self.lost[lever]
        return lost / (PRIOR_WEIGHT + self.dropped[lever])

    def updated(self, record: StepRecord, topology: Topology) -> LossModel:
        """The model after one more pass; itself where no lever dropped a row.

        Every token of a record has top-k rows in every layer.
        """
        lever = record.used_lever
        if lever == Lever.NONE or record.num_dropped_rows <= 0:
            return self
        num_rows = int(record.num_tokens_R.sum()) * topology.topk * topology.num_layers
        known = math.isfinite(record.routed_mass) and math.isfinite(record.lost_mass)
        if not known or record.routed_mass <= 0.0 or num_rows == 0:
            return self
        lost, dropped = list(self.lost), list(self.dropped)
        lost[lever] = FORGETTING * lost[lever] + record.lost_mass / record.routed_mass
        dropped[lever] = FORGETTING * dropped[lever] + record.num_dropped_rows / num_rows
        return LossModel(lost=tuple(lost), dropped=tuple(dropped))
