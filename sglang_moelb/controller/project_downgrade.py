"""What a lever would have left of a pass, and how the lever downgrade answers that.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_moelb.controller.load import BoolArray, PassLoad, balance_of
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.types import IntArray, Lever, Policy, Topology

VISION = 1  # of an array's last axis by modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """What a lever would have left of one pass; rows at low precision count for what they cost."""

    lever: Lever
    max_rows_L: IntArray  # rows of the fullest rank
    balance: float  # mean over layers of max/mean rank rows
    dropped_share: float  # dropped rows as a share of all rows
    slowest_rows: int  # the sum of max_rows_L
    low_share: float = 0.0  # rows at low precision as a share of all rows
    num_copies: int = 0  # to the rank that receives most in a layer, added up over layers


def low_ranks(rows_LR: IntArray, vision_LR: IntArray, policy: Policy) -> BoolArray:
    """Which ranks ReaLB's rule lowers in each layer, [L, R]. Runs on the host. Source: ReaLB.

    Those above `capacity_factor` times the mean rows of which more than `vision_share` are vision.
    """
    mean_L1 = rows_LR.sum(axis=1, keepdims=True) / rows_LR.shape[1]
    hot_LR = rows_LR > policy.capacity_factor * mean_L1
    low_LR: BoolArray = hot_LR & (vision_LR > policy.vision_share * rows_LR)
    return low_LR


def downgraded(
    load: PassLoad, topology: Topology, policy: Policy, low_cost: LowCost
) -> Projection:
    """What the lever downgrade would have left of one pass, as rows of the usual precision.

    The forms experts and fewest are taken as whole ranks, and ranks are left alone in a pass with
    a token of a request that refuses, whose rows may go to any of them. Runs on the host. Source:
    ReaLB; ours.
    """
    low_LR = np.zeros_like(load.rows_LR)
    if load.num_refused_tokens == 0:
        vision_LE = load.record.rows_LEM[..., VISION]
        vision_LR = vision_LE.reshape(*load.rows_LR.shape, -1).sum(axis=2)
        low_LR = load.rows_LR * low_ranks(load.rows_LR, vision_LR, policy)
    left_LR = low_cost.effective(load.rows_LR, low_LR, topology).round().astype(np.int64)
    max_L = left_LR.max(axis=1)
    return Projection(
        lever=Lever.DOWNGRADE,
        max_rows_L=max_L,
        balance=float(balance_of(max_L, left_LR.sum(axis=1), topology.num_ranks).mean()),
        dropped_share=0.0,
        slowest_rows=int(max_L.sum()),
        low_share=int(low_LR.sum()) / max(int(load.rows_L.sum()), 1),
    )
