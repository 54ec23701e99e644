"""What a resident placement does to a load: R&Q's score, and the balance of ranks.

Rows of an expert are taken to be split evenly between its copies.

Shape letters: P passes, L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np

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
