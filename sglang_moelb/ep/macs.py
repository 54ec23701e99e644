"""MACS on the device: capacities that follow the modality mix, and rerouting before dropping.

Mirrors `controller.plan.macs_capacity` in int64 arithmetic. Which experts are visual is learned
from the exchanged counts of earlier passes, so that every rank holds the same classes; MACS takes
them from a held-out set.

Shape letters: T rows, K top-k, E logical experts, R ranks, G groups, W row width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_moelb.ep.cut import Asked, Cut, cut_to
from sglang_moelb.kernels.count_experts import count_experts
from sglang_moelb.kernels.row_layout import (
    C_CUTTABLE_AMOUNT,
    C_PROTECTED_AMOUNT,
    C_TEXT_ROWS,
    C_VISION_ROWS,
    H_AMOUNT,
    H_VISION_AMOUNT,
    MASS_ONE,
    NUM_COUNTS,
    counts_of,
)
from sglang_moelb.kernels.widen_candidates import widen_candidates
from sglang_moelb.types import Level, Topology

HALVING_ROWS = 1 << 24  # the learned counts are halved here, so that old traffic fades
STAT_LOST_MASS, STAT_DROPPED_ROWS, STAT_MOVED_MASS, STAT_MOVED_ROWS = 1, 3, 6, 7


class MacsState:
    """Learned modality of each layer's experts; equal on all ranks."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._seen_LE2: torch.Tensor | None = None

    def learn(self, layer: int, rows_RW: torch.Tensor) -> None:
        """Add a layer's exchanged counts."""
        topology = self._topology
        if self._seen_LE2 is None:
            shape = (topology.num_layers, topology.num_experts, 2)
            self._seen_LE2 = torch.zeros(shape, dtype=torch.int64, device=rows_RW.device)
        seen_E2 = self._seen_LE2[layer]
        counts_RE = counts_of(rows_RW, topology.num_experts)
        seen_E2 += counts_RE[..., [C_TEXT_ROWS, C_VISION_ROWS]].sum(dim=0)
        full = seen_E2.sum() > HALVING_ROWS
        seen_E2 >>= full.to(torch.int64)

    def capacities(
        self, layer: int, rows_RW: torch.Tensor, base_amount: int, rho: float, level: Level
    ) -> torch.Tensor:
        """Capacity of each group in amounts, int64 `[G]`; see `controller.plan.macs_capacity`."""
        vision = rows_RW[:, H_VISION_AMOUNT].sum(dtype=torch.int64)
        amount = rows_RW[:, H_AMOUNT].sum(dtype=torch.int64)
        share_q16 = torch.where(amount > 0, (vision << 16) // amount.clamp(min=1), 1 << 15)
        rho_q16 = int(rho * 65536 + 0.5)
        classes_G = self._classes(layer, level, rows_RW.device)
        scale_G = 65536 + ((classes_G * (rho_q16 * (share_q16 - (1 << 15)))) >> 16)
        return ((base_amount * scale_G) >> 16).clamp(min=base_amount >> 2)

    def _classes(self, layer: int, level: Level, device: torch.device) -> torch.Tensor:
        topology = self._topology
        if self._seen_LE2 is None:
            num_groups = (
                topology.num_experts if level is Level.EXPERT else topology.num_ranks
            )
            return torch.zeros(num_groups, dtype=torch.int64, device=device)
        seen_G2 = self._seen_LE2[layer]
        if level is Level.DEVICE:
            seen_G2 = seen_G2.view(topology.num_ranks, -1, 2).sum(dim=1)
        vision_G, rows_G = seen_G2[:, 1], seen_G2.sum(dim=1)
        return (vision_G * 5 > rows_G * 3).long() - (vision_G * 5 < rows_G * 2).long()


def reroute(
    cut: Cut, asked: Asked, scores_TE: torch.Tensor, topology: Topology, rank: int
) -> Cut:
    """Give dropped rows to experts of their own rank that have room.

    The j-th dropped row of a token asks for its j-th best local expert outside its top-k, with the
    gate weight scaled by the ratio of the scores; the best ranked rows get the room (ours: MACS
    leaves target and order open). Only tokens of a rank ask for its experts, so ranks need not
    agree.
    """
    num_local, topk = topology.experts_per_rank, topology.topk
    wide_ids, wide_weights = widen_candidates(
        asked.ids_TC, asked.weights_TC, scores_TE, asked.flags_T,
        first_local=rank * num_local, num_local=num_local, num_extra=topk,
    )  # fmt: skip
    dropped_TK = (asked.ids_TC >= 0) & (cut.ids_TC < 0)
    turn_TK = (dropped_TK.long().cumsum(dim=1) - 1).clamp(min=0)
    new_ids_TK = torch.where(dropped_TK, wide_ids[:, topk:].gather(1, turn_TK), -1)
    new_weights_TK = torch.where(new_ids_TK >= 0, wide_weights[:, topk:].gather(1, turn_TK), 0.0)
    second = replace(asked, ids_TC=new_ids_TK, weights_TC=new_weights_TK)
    row_W, keys_TK = count_experts(
        new_ids_TK, new_weights_TK, asked.flags_T, asked.amounts_T,
        num_experts=topology.num_experts, topk=topk, key_rule=asked.key_rule,
    )  # fmt: skip
    assert keys_TK is not None
    moved = cut_to(_room(cut, topology), second, keys_TK, row_W[None], 0, topology)
    moved_TK = moved.ids_TC >= 0
    return replace(
        cut,
        ids_TC=torch.where(moved_TK, moved.ids_TC, cut.ids_TC),
        weights_TC=torch.where(moved_TK, moved.weights_TC, cut.weights_TC),
        stats_8=_moved_stats(cut.stats_8, asked.weights_TC, moved_TK),
    )


def _room(cut: Cut, topology: Topology) -> torch.Tensor:
    """What each group's capacity leaves after the cut, in amounts, int64 `[G]`."""
    counts_E = counts_of(cut.seen_RW, topology.num_experts).sum(dim=0, dtype=torch.int64)
    counts_G = counts_E.view(cut.capacity_G.numel(), -1, NUM_COUNTS).sum(dim=1)
    protected_G = counts_G[:, C_PROTECTED_AMOUNT]
    room_G = (cut.capacity_G - protected_G).clamp(min=0)
    return room_G - torch.minimum(counts_G[:, C_CUTTABLE_AMOUNT], room_G)


def _moved_stats(
    stats_8: torch.Tensor, weights_TK: torch.Tensor, moved_TK: torch.Tensor
) -> torch.Tensor:
    moved_mass = (weights_TK.double() * moved_TK * MASS_ONE).round().sum().long()
    num_moved = moved_TK.sum()
    stats_8 = stats_8.clone()
    stats_8[STAT_LOST_MASS] -= moved_mass
    stats_8[STAT_DROPPED_ROWS] -= num_moved
    stats_8[STAT_MOVED_MASS] += moved_mass
    stats_8[STAT_MOVED_ROWS] += num_moved
    return stats_8
