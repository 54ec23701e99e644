"""Measured times of the experts of any rank, and the rows and copies that they were for.

The rank that records a pass knows its own times by layer, of the others it is told the time over
all layers, some passes later. From either the costs of low precision and of copies are learned.

Shape letters: L MoE layers, R ranks, N measured times, G layers that one of them is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_moelb.types import FloatArray, IntArray, RankReport, StepRecord

OUTLIER = 5.0  # times the time of the rows at the model's own precision, without copies


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimes:
    """Times of one rank's experts in a pass, each over G layers: their rows, low rows, copies."""

    ms_N: FloatArray
    rows_NG: IntArray
    low_NG: IntArray
    copies_NG: IntArray

    @staticmethod
    def own(record: StepRecord) -> RankTimes:
        """Of the rank that recorded the pass, layer by layer. Runs on the host. Ours."""
        return _times(record, record.rank, record.experts_ms_L, (-1, 1))

    @staticmethod
    def of(record: StepRecord, rank: int, experts_ms: float) -> RankTimes:
        """Of another rank, over all layers. Runs on the host. Ours."""
        return _times(record, rank, np.array([experts_ms]), (1, -1))

    def plain_ms(self, fixed_ms: float, ms_per_row: float) -> FloatArray:
        """What the rows would take at the model's own precision, without copies; [N]."""
        num_layers = self.rows_NG.shape[1]
        plain_N: FloatArray = fixed_ms * num_layers + ms_per_row * self.rows_NG.sum(axis=1)
        return plain_N

    def usable(self, plain_N: FloatArray) -> NDArray[np.bool_]:
        """Which times are finite, positive and no outliers beside `plain_ms`; [N]."""
        usable_N: NDArray[np.bool_] = (self.ms_N > 0) & (self.ms_N < OUTLIER * plain_N)
        return usable_N


def _times(
    record: StepRecord, rank: int, ms_N: FloatArray, shape: tuple[int, int]
) -> RankTimes:
    rows_LR = record.rows_after_LR
    nothing_LR = np.zeros_like(rows_LR)
    low_LR = nothing_LR if record.low_rows_LR is None else record.low_rows_LR
    copies_LR = nothing_LR if record.num_copies_LR is None else record.num_copies_LR
    rows_NG, low_NG, copies_NG = (
        one_LR[:, rank].reshape(shape) for one_LR in (rows_LR, low_LR, copies_LR)
    )
    return RankTimes(ms_N=ms_N, rows_NG=rows_NG, low_NG=low_NG, copies_NG=copies_NG)


class Reports:
    """What other ranks told of the passes of the window."""

    def __init__(self) -> None:
        self._ms: dict[int, dict[int, float]] = {}  # by pass and rank

    def take(
        self, reports: Iterable[RankReport], window: Sequence[StepRecord]
    ) -> list[RankTimes]:
        """Times that had not been told before, of passes of the window.

        A report is repeated until there is another. Runs on the host.
        """
        records = {record.step: record for record in window}
        self._ms = {step: told for step, told in self._ms.items() if step in records}
        fresh = []
        for rank, step, experts_ms in reports:
            told = self._ms.setdefault(step, {}) if step in records else {rank: 0.0}
            if rank not in told:
                told[rank] = experts_ms
                fresh.append(RankTimes.of(records[step], rank, experts_ms))
        return fresh

    @property
    def by_step(self) -> Mapping[int, Mapping[int, float]]:
        """Milliseconds over all layers, by pass and rank."""
        return self._ms
