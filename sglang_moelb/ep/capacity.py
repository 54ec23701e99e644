"""Capacities of a pass from host integers only. Light to import: no torch.

Shape letters: R ranks.
"""

from __future__ import annotations

from sglang_moelb.controller.plan import capacity_rows
from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.kernels.row_layout import AMOUNT_ONE
from sglang_moelb.types import Level, Rule, Scope, Topology


def num_groups_of(topology: Topology, level: Level) -> int:
    """How many capacities a layer has: one an expert, or one a rank."""
    return topology.num_experts if level is Level.EXPERT else topology.num_ranks


def group_capacity(topology: Topology, agreed: Agreed, rank: int) -> int:
    """Capacity of every group in amounts, from host integers only; equal on ranks in one scope.

    Capacity-Aware Inference, Algorithm 1: floor(factor * tokens * k / groups), at least 1 row.
    """
    policy = agreed.policy
    num_tokens = (
        agreed.sizes_R[rank].num_tokens if policy.scope is Scope.SOURCE else agreed.num_tokens
    )
    rows = capacity_rows(
        policy.capacity_factor,
        num_tokens * topology.topk,
        num_groups_of(topology, policy.level),
    )
    return rows * AMOUNT_ONE if policy.rule is Rule.MACS else rows
