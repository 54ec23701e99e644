"""EPLB: experts placed, some of them twice, by the load of past passes.

Shape letters: P passes, L MoE layers, R EP ranks, E logical experts, C physical copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_moelb.replay.types import Counts, Outcome, by_rank
from sglang_moelb.types import IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Which expert each copy holds, rank by rank in equal blocks, and how many copies each has."""

    phy2log_LC: IntArray
    num_copies_LE: IntArray


def place(weight_LE: IntArray, num_redundant: int, num_ranks: int) -> Placement:
    """EPLB's global form: replicate the hottest per copy, pack heaviest first, equal counts a rank.

    Example: weights (9, 3, 3, 3), no redundant experts, 2 ranks. 9 goes to rank 0, the 3s to rank
    1 until its two slots are full, the last 3 to rank 0.

    Source: EPLB, steps 1 and 2; ties go to the lower expert and rank. Copies may share a rank, as
    there.
    """
    num_layers, num_experts = weight_LE.shape
    at_L = np.arange(num_layers)
    copies_LE = np.ones_like(weight_LE)
    log_LC = np.tile(np.arange(num_experts), (num_layers, 1))
    for _ in range(num_redundant):
        hottest_L = (weight_LE / copies_LE).argmax(axis=1)
        copies_LE[at_L, hottest_L] += 1
        log_LC = np.concatenate([log_LC, hottest_L[:, None]], axis=1)
    share_LC = np.take_along_axis(weight_LE / copies_LE, log_LC, axis=1)
    slots = log_LC.shape[1] // num_ranks
    load_LR, used_LR = np.zeros((num_layers, num_ranks)), np.zeros((num_layers, num_ranks), int)
    phy2log_LC = np.empty_like(log_LC)
    for copy_L in np.argsort(-share_LC, axis=1, kind="stable").T:
        rank_L = np.where(used_LR < slots, load_LR, np.inf).argmin(axis=1)
        phy2log_LC[at_L, rank_L * slots + used_LR[at_L, rank_L]] = log_LC[at_L, copy_L]
        load_LR[at_L, rank_L] += share_LC[at_L, copy_L]
        used_LR[at_L, rank_L] += 1
    return Placement(phy2log_LC=phy2log_LC, num_copies_LE=copies_LE)


def spread(rows_PLE: IntArray, placement: Placement, num_ranks: int) -> IntArray:
    """Rows on each rank where an expert's rows are dealt evenly to its copies, [P, L, R]."""
    log_LC = placement.phy2log_LC
    same_LCC = log_LC[:, :, None] == log_LC[:, None, :]
    place_LC = np.tril(same_LCC, -1).sum(axis=2)  # first, second, ... copy of its expert
    copies_LC = np.take_along_axis(placement.num_copies_LE, log_LC, axis=1)
    rows_PLC = np.take_along_axis(rows_PLE, log_LC[None], axis=2)
    return by_rank(rows_PLC // copies_LC + (place_LC < rows_PLC % copies_LC), num_ranks)


class Eplb:
    """EPLB over a trace: placed anew every `interval` passes by the rows of the last `window`.

    Stock placement until then. A rule with a memory: passes must come in order. `num_redundant` is
    rounded up so that ranks hold equally many copies.
    """

    def __init__(self, *, window: int = 100, interval: int = 100, num_redundant: int = 8) -> None:
        self._window, self._interval, self._num_redundant = window, interval, num_redundant
        self._history: list[IntArray] = []
        self._num_seen = 0
        self._placement: Placement | None = None

    def __call__(self, counts: Counts) -> Outcome:
        """What the placement of the time leaves of each pass."""
        rows_PLE, num_ranks = counts.rows_PLE, counts.num_ranks
        after_PLR = counts.rows_PLR
        start = 0
        while start < len(rows_PLE):
            end = min(len(rows_PLE), start + self._interval - self._num_seen % self._interval)
            if self._placement is not None:
                after_PLR[start:end] = spread(rows_PLE[start:end], self._placement, num_ranks)
            self._remember(rows_PLE[start:end], num_ranks)
            start = end
        return Outcome(rows_PLR=after_PLR)

    def _remember(self, rows_PLE: IntArray, num_ranks: int) -> None:
        self._history = [*self._history, *rows_PLE][-self._window :]
        self._num_seen += len(rows_PLE)
        if self._num_seen % self._interval == 0:
            num_copies = rows_PLE.shape[2] + self._num_redundant
            extra = self._num_redundant + -num_copies % num_ranks
            weight_LE = np.sum(self._history, axis=0)
            self._placement = place(weight_LE, extra, num_ranks)
