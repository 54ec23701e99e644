"""What a resident placement does to a load: R&Q's score, and the balance of ranks.

Rows of an expert are taken to be split evenly between its copies.

Shape letters: P passes, L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_moelb.controller.split import UNITS, Shares, ranks_of
from sglang_moelb.placement import LayerPlacement, LoadFigures
from sglang_moelb.types import FloatArray, IntArray, Topology


def instance_rows(rows_PLE: IntArray, layers: tuple[LayerPlacement, ...]) -> FloatArray:
    """Rows of the busiest copy of each expert under an even split, [P, L, E]."""
    copies_LE = np.ones(rows_PLE.shape[1:])
    for number, layer in enumerate(layers):
        for replica in layer.replicas:
            copies_LE[number, replica.expert] += 1
    each_PLE: FloatArray = rows_PLE / copies_LE
    return each_PLE


def rank_rows(
    rows_PLE: IntArray, layers: tuple[LayerPlacement, ...], topology: Topology
) -> FloatArray:
    """Rows of each rank under an even split between copies, [P, L, R]."""
    each_PLE = instance_rows(rows_PLE, layers)
    by_rank = (*rows_PLE.shape[:2], topology.num_ranks, -1)
    rows_PLR: FloatArray = each_PLE.reshape(by_rank).sum(axis=3)
    for number, layer in enumerate(layers):
        for replica in layer.replicas:
            rows_PLR[:, number, replica.rank] += each_PLE[:, number, replica.expert]
    return rows_PLR


class SplitRows:
    """Whole rows of each rank where rows are dealt to copies one by one, an original first.

    Experts with shares are dealt by them.

    An estimate of what a server does: it deals by the places of tokens, not by experts.
    """

    def __init__(
        self,
        layers: tuple[LayerPlacement, ...],
        topology: Topology,
        shares_L: Sequence[Shares] = (),
    ) -> None:
        self._num_ranks = topology.num_ranks
        homes, moved, shared = [], [], []
        for number, layer in enumerate(layers):
            shares = shares_L[number] if shares_L else {}
            for expert, held in ranks_of(layer, topology).items():
                homes.append((number, expert, held[0]))
                if own := shares.get(expert):
                    ends = np.cumsum(own).tolist()
                    begins = (0, *ends[:-1])
                    shared += [
                        (number, expert, rank, begin, end)
                        for rank, begin, end in zip(held, begins, ends, strict=True)
                    ]
                    continue
                for turn, rank in enumerate(held):
                    moved.append((number, expert, rank, turn, len(held)))
        self._shared = np.array(shared, dtype=np.int64).reshape(-1, 5).T
        self._homes = np.array(homes, dtype=np.int64).reshape(-1, 3).T
        self._moved = np.array(moved, dtype=np.int64).reshape(-1, 5).T

    def __call__(self, rows_LE: IntArray) -> IntArray:
        """Rows of each rank, [L, R]; they add up to the rows routed."""
        rows_LR: IntArray = rows_LE.reshape(len(rows_LE), self._num_ranks, -1).sum(axis=2)
        layer, expert, rank = self._homes
        np.subtract.at(rows_LR, (layer, rank), rows_LE[layer, expert])
        layer, expert, rank, turn, num_copies = self._moved
        rows = rows_LE[layer, expert]
        np.add.at(rows_LR, (layer, rank), rows // num_copies + (turn < rows % num_copies))
        layer, expert, rank, begin, end = self._shared
        rows = rows_LE[layer, expert]
        np.add.at(rows_LR, (layer, rank), rows * end // UNITS - rows * begin // UNITS)
        return rows_LR


def lis(rows_LE: IntArray, layers: tuple[LayerPlacement, ...]) -> FloatArray:
    """R&Q's load-imbalance score of each layer: E times the busiest copy's rows over all rows.

    With replicas E stays the number of logical experts, as the paper's ratios have it. 1 for a
    layer without rows.
    """
    busiest_L = instance_rows(rows_LE[None], layers)[0].max(axis=1)
    sum_L = rows_LE.sum(axis=1)
    score_L: FloatArray = np.where(
        sum_L > 0, rows_LE.shape[1] * busiest_L / np.maximum(sum_L, 1), 1.0
    )
    return score_L


class LoadSums:
    """Adds up passes for `LoadFigures` of one placement, some at a time."""

    def __init__(self, layers: tuple[LayerPlacement, ...], topology: Topology) -> None:
        self._layers, self._topology = layers, topology
        self.rows_LE = np.zeros((topology.num_layers, topology.num_experts), dtype=np.int64)
        self._balance_L = np.zeros(topology.num_layers)
        self.num_passes = 0

    def add(self, rows_PLE: IntArray) -> None:
        """Take in passes."""
        balance_PL = _balance(rank_rows(rows_PLE, self._layers, self._topology))
        self._balance_L += balance_PL.sum(axis=0)
        self.rows_LE += rows_PLE.sum(axis=0)
        self.num_passes += len(rows_PLE)

    def figures(self) -> LoadFigures:
        """Of all passes added; there must be one."""
        all_LR = rank_rows(self.rows_LE[None], self._layers, self._topology)[0]
        return LoadFigures(
            lis=_rounded(lis(self.rows_LE, self._layers)),
            rank_balance=_rounded(_balance(all_LR)),
            pass_balance=_rounded(self._balance_L / self.num_passes),
        )


def _balance(rows_PR: FloatArray) -> FloatArray:
    """max/mean over the last axis; 1 where there are no rows."""
    mean_P = rows_PR.mean(axis=-1)
    ratio_P: FloatArray = np.where(mean_P > 0, rows_PR.max(axis=-1) / np.maximum(mean_P, 1e-9), 1.0)
    return ratio_P


def _rounded(values_L: FloatArray) -> list[float]:
    return [round(value, 4) for value in values_L.tolist()]
