"""Which experts of a layer run at low precision: count, exchange and plan, the same on all ranks.

Shape letters: R ranks, W row width, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange, SymmetricExchange
from sglang_moelb.kernels.count_experts import count_experts
from sglang_moelb.kernels.plan_downgrade import plan_downgrade
from sglang_moelb.types import Policy, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class LowPlan:
    """Every rank's counts and the experts to lower, int32 on the device, equal on all ranks."""

    counts_RW: torch.Tensor
    low_E: torch.Tensor


def plan_low(
    routed: LayerInput,
    policy: Policy,
    topology: Topology,
    exchange: Exchange | SymmetricExchange,
) -> LowPlan:
    """Plan one layer under the lever downgrade; routing is not touched.

    Ends in a collective, so every rank comes here, also one without tokens. No host sync. Source:
    ReaLB, arXiv 2604.19503.
    """
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
    return LowPlan(counts_RW=counts_RW, low_E=low_E)
