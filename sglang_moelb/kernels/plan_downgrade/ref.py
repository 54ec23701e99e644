"""Reference of `plan_downgrade` in plain torch.

Shape letters: as in the package; S experts of a rank, so that RS is E seen by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.types import Form

ONE = 1_000_000  # factors and shares are integers of this unit
MAX_CAPACITY_FACTOR = 100.0


def plan_downgrade(
    counts_RW: Tensor,
    *,
    num_experts: int,
    capacity_factor: float,
    vision_share: float,
    form: int,
    low_cost: float = 0.66,
) -> Tensor:
    """See `sglang_moelb.kernels.plan_downgrade`. Runs wherever its tensors are."""
    num_ranks = len(counts_RW)
    capacity, share, saved = check_plan(
        num_ranks, num_experts, capacity_factor, vision_share, form, low_cost
    )
    counts_E5 = layout.counts_of(counts_RW, num_experts).long().sum(dim=0)
    vision_RS = counts_E5[:, layout.C_VISION_ROWS].view(num_ranks, -1)
    rows_RS = counts_E5[:, layout.C_TEXT_ROWS].view(num_ranks, -1) + vision_RS
    free_RS = counts_E5[:, layout.C_REFUSED_ROWS].view(num_ranks, -1) == 0
    load_R1, total = rows_RS.sum(dim=1, keepdim=True), rows_RS.sum()

    hot_R1 = load_R1 * num_ranks * ONE > capacity * total
    vision_R1 = vision_RS.sum(dim=1, keepdim=True) * ONE > share * load_R1.clamp(min=1)
    if form == Form.RANK:
        low_RS = (hot_R1 & vision_R1 & free_RS.all(dim=1, keepdim=True)).expand(rows_RS.shape)
    else:
        low_RS = hot_R1 & vision_R1 & free_RS
        low_RS = low_RS & (vision_RS * ONE > share * rows_RS.clamp(min=1))
    if form == Form.EXPERTS:
        low_RS = low_RS & (rows_RS * num_experts * ONE > capacity * total)
    elif form == Form.FEWEST:
        candidate_RS = rows_RS.where(low_RS, 0)
        order_RS = candidate_RS.argsort(dim=1, descending=True, stable=True)
        sorted_RS = candidate_RS.gather(1, order_RS)
        earlier_RS = torch.empty_like(rows_RS)
        earlier_RS.scatter_(1, order_RS, sorted_RS.cumsum(dim=1) - sorted_RS)
        low_RS = low_RS & (num_ranks * (ONE * load_R1 - saved * earlier_RS) > ONE * total)
    return low_RS.flatten().int()


def check_plan(
    num_ranks: int,
    num_experts: int,
    capacity_factor: float,
    vision_share: float,
    form: int,
    low_cost: float,
) -> tuple[int, int, int]:
    """Capacity factor, vision share and 1 - low_cost in millionths. ValueError if out of range."""
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be split evenly over {num_ranks} ranks")
    if form not in tuple(Form):
        raise ValueError(f"form {form} is not one of {[int(form) for form in Form]}")
    for name, value, largest in (
        ("capacity_factor", capacity_factor, MAX_CAPACITY_FACTOR),
        ("vision_share", vision_share, 1.0),
        ("low_cost", low_cost, 1.0),
    ):
        if not 0.0 <= value <= largest:
            raise ValueError(f"{name} {value} is not between 0 and {largest:g}")
    return round(capacity_factor * ONE), round(vision_share * ONE), ONE - round(low_cost * ONE)
