"""The cut of one layer as a function: what a rank asks for, and what capacities leave of it.

Shape letters: T rows of this rank, C columns, R ranks, G groups, W row width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.kernels.cut_tokens import cut_tokens
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.plan_cuts import plan_cuts
from sglang_moelb.types import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Rows that a rank asks experts to take: routed columns first, candidates behind."""

    ids_TC: torch.Tensor
    weights_TC: torch.Tensor
    flags_T: torch.Tensor
    amounts_T: torch.Tensor | None
    key_rule: KeyRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What is left of the rows, and the capacities and counts that decided it."""

    ids_TC: torch.Tensor
    weights_TC: torch.Tensor
    stats_8: torch.Tensor
    seen_RW: torch.Tensor
    capacity_G: torch.Tensor


def cut_to(
    capacity_G: torch.Tensor,
    asked: Asked,
    keys_TC: torch.Tensor,
    seen_RW: torch.Tensor,
    my_row: int,
    topology: Topology,
) -> Cut:
    """Plan the cut from the rows of all ranks in scope and apply it to this rank's.

    `seen_RW` int32 are the exchanged rows in scope, `my_row` this rank's place among them,
    `capacity_G` int64 in amounts. On the device of the tensors, no sync.
    """
    cut_bin_G, cut_quota_G = plan_cuts(
        seen_RW, capacity_G, my_rank=my_row, num_experts=topology.num_experts
    )
    ids_TC, weights_TC, stats_8 = cut_tokens(
        asked.ids_TC,
        asked.weights_TC,
        keys_TC,
        asked.flags_T,
        asked.amounts_T,
        cut_bin_G,
        cut_quota_G,
        num_experts=topology.num_experts,
        topk=topology.topk,
    )
    return Cut(
        ids_TC=ids_TC,
        weights_TC=weights_TC,
        stats_8=stats_8,
        seen_RW=seen_RW,
        capacity_G=capacity_G,
    )
