"""Which experts of a layer are copied where: count, exchange and plan, the same on all ranks.

Shape letters: T rows of this rank, K top-k, R ranks, W row width, E logical experts, S slots of a
rank, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange, SymmetricExchange
from sglang_moelb.kernels.count_experts import count_layers
from sglang_moelb.kernels.place_replicas import place_replicas
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Policy, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPlan:
    """Every rank's counts and the plan made of them, int32 on the device, equal on all ranks.

    `slots_RS` is the logical expert in each slot or -1, `quota_ER` the rows of each expert that
    each rank computes.
    """

    counts_RW: torch.Tensor
    slots_RS: torch.Tensor
    quota_ER: torch.Tensor


def plan_copies(
    routed: LayerInput,
    policy: Policy,
    topology: Topology,
    exchange: Exchange | SymmetricExchange,
    *,
    num_slots: int,
) -> CopyPlan:
    """Plan one layer under the lever replicate; protected tokens take part, since it is exact.

    Ends in a collective, so every rank comes here, also one without tokens. No host sync.
    """
    width = row_width(topology.num_experts, with_histogram=False)
    place_W = exchange.place(width)
    row_1W = count_layers(
        routed.ids_TK.contiguous()[None],
        routed.flags_T,
        num_experts=topology.num_experts,
        out_LW=None if place_W is None else place_W.view(1, width),
    )
    counts_RW = exchange.gather(row_1W.view(-1) if place_W is None else place_W)
    slots_RS, quota_ER, _ = place_replicas(
        counts_RW,
        num_experts=topology.num_experts,
        num_slots=num_slots,
        send_rows=policy.send_rows,
        receive_rows=policy.receive_rows,
        min_rows=policy.min_copy_rows,
    )
    return CopyPlan(counts_RW=counts_RW, slots_RS=slots_RS, quota_ER=quota_ER)


def told_of(plans_L: Sequence[CopyPlan]) -> torch.Tensor:
    """What a pass has to tell of its plans, int32 `[L, R, 2]`: rows computed and copies taken.

    On the device of the plans, no sync.
    """
    rows_LR = torch.stack([plan.quota_ER for plan in plans_L]).sum(dim=1, dtype=torch.int32)
    held_LRS = torch.stack([plan.slots_RS for plan in plans_L]) >= 0
    return torch.stack([rows_LR, held_LRS.sum(dim=2, dtype=torch.int32)], dim=2)
