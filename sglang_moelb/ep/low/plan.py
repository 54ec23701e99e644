"""Which experts of a layer run at low precision: count, exchange and plan, the same on all ranks.

Shape letters: T rows of this rank, K top-k, R ranks, W row width, E logical experts,
G groups that are lowered as a whole: experts, or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange, SymmetricExchange
from sglang_moelb.kernels.count_experts import count_experts
from sglang_moelb.kernels.plan_downgrade import plan_downgrade
from sglang_moelb.kernels.row_layout import C_PROTECTED_ROWS, counts_of
from sglang_moelb.types import Form, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class LowPlan:
    """Every rank's counts and the experts to lower, int32 on the device, equal on all ranks."""

    counts_RW: torch.Tensor
    low_E: torch.Tensor


def plan_low(
    routed: LayerInput,
    agreed: Agreed,
    topology: Topology,
    exchange: Exchange | SymmetricExchange,
) -> LowPlan:
    """Plan one layer under the lever downgrade; routing is not touched.

    Ends in a collective, so every rank comes here, also one without tokens. No host sync. Source:
    ReaLB, arXiv 2604.19503. That an expert with protected rows is left alone, and under Form.RANK
    all experts of its rank, is ours: a rank computes all rows of an expert in one precision.
    """
    policy = agreed.policy
    row_W, _ = count_experts(
        routed.ids_TK,
        routed.weights_TK,
        routed.flags_T,
        None,
        num_experts=topology.num_experts,
        topk=topology.topk,
        key_rule=None,
    )
    counts_RW = exchange.gather(row_W)
    low_E = plan_downgrade(
        counts_RW,
        num_experts=topology.num_experts,
        capacity_factor=policy.capacity_factor,
        vision_share=policy.vision_share,
        form=policy.form,
    )
    if any(sizes.num_protected_tokens for sizes in agreed.sizes_R):
        low_E = _without_protected(low_E, counts_RW, policy.form, topology)
    return LowPlan(counts_RW=counts_RW, low_E=low_E)


def _without_protected(
    low_E: torch.Tensor, counts_RW: torch.Tensor, form: Form, topology: Topology
) -> torch.Tensor:
    counts_E = counts_of(counts_RW, topology.num_experts)[..., C_PROTECTED_ROWS].sum(dim=0)
    groups = topology.num_ranks if form is Form.RANK else topology.num_experts
    free_G = counts_E.view(groups, -1).sum(dim=1, keepdim=True) == 0
    return (low_E.view(groups, -1) * free_G).view(-1)
