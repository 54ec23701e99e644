"""What the experts of a rank that is not the leader took, for the leader to learn from.

It is read from marks that the device has passed, without a host sync, and travels with the next
agreement: the rank with the most rows, or with copies, need not be the leader.

Shape letters: L MoE layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sglang_moelb.ep.records import Marks

FIRST, LAST = REPORTED_PARTS = ("experts", "combine")


class ExpertTimes:
    """Passes whose experts were marked here, and what the newest that has ended took.

    `experts_us` is microseconds over all layers of pass `step`; 0 where nothing is known.
    """

    def __init__(self) -> None:
        self.step = self.experts_us = 0
        self._passes: deque[tuple[int, Sequence[Marks]]] = deque()

    def add(self, step: int, marks_L: Sequence[Marks]) -> None:
        """A pass whose last work is enqueued, with the marks that each layer has."""
        if marks_L and all(FIRST in marks and LAST in marks for marks in marks_L):
            self._passes.append((step, marks_L))

    def look(self) -> None:
        """Take in the passes that the device has ended, and give their marks back; no wait."""
        while self._passes and self._passes[0][1][-1][LAST].is_reached():
            self.step, marks_L = self._passes.popleft()
            self.experts_us = 0
            for marks in marks_L:
                ms = marks[FIRST].ms_until(marks[LAST])  # type: ignore[arg-type]
                self.experts_us += round(1e3 * ms)
            for marks in marks_L:
                for mark in marks.values():
                    mark.give_back()
