"""Reference of `reroute` in plain torch. Shape letters as in the package, N routed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.place_replicas.ref import routed_rows


def reroute(
    ids_TK: Tensor,
    rows_RW: Tensor,
    slots_RS: Tensor,
    quota_ER: Tensor,
    *,
    my_rank: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `sglang_moelb.kernels.reroute`. Runs wherever its tensors are."""
    check_reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank)
    num_experts = len(quota_ER)
    is_routed_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    expert_N = ids_TK[is_routed_TK].long()
    end_ER = _ends(routed_rows(rows_RW, num_experts), quota_ER.long(), my_rank)
    rank_N = (_positions(expert_N, num_experts)[:, None] >= end_ER[expert_N]).sum(dim=1)
    place_ER = _places(slots_RS, num_experts)
    physical_TK = torch.full_like(
        ids_TK, -1, dtype=dtype, memory_format=torch.contiguous_format
    )
    num_places = num_experts // len(slots_RS) + slots_RS.shape[1]
    physical_N = rank_N * num_places + place_ER[expert_N, rank_N]
    physical_TK[is_routed_TK] = physical_N.to(physical_TK.dtype)
    return physical_TK


def _ends(rows_RE: Tensor, quota_ER: Tensor, my_rank: int) -> Tensor:
    """Position of this rank's rows of an expert at which those for a rank end, int64 [E, R]."""
    local_ER = rows_RE.t().minimum(quota_ER)
    left_ER = rows_RE.t() - local_ER
    start_E1 = left_ER[:, :my_rank].sum(dim=1, keepdim=True)
    end_E1 = start_E1 + left_ER[:, my_rank : my_rank + 1]
    room_ER = quota_ER - local_ER
    room_end_ER = room_ER.cumsum(dim=1)
    share_ER = end_E1.minimum(room_end_ER) - start_E1.maximum(room_end_ER - room_ER)
    share_ER = share_ER.clamp(min=0)
    share_ER[:, my_rank] += local_ER[:, my_rank]
    return share_ER.cumsum(dim=1)


def _positions(expert_N: Tensor, num_experts: int) -> Tensor:
    """How many earlier rows each row's expert has, int64 [N]."""
    order_N = expert_N.argsort(stable=True)
    count_E = torch.bincount(expert_N, minlength=num_experts)
    first_E = count_E.cumsum(dim=0) - count_E
    position_N = torch.empty_like(expert_N)
    places_N = torch.arange(len(expert_N), device=expert_N.device)
    position_N[order_N] = places_N - first_E[expert_N[order_N]]
    return position_N


def _places(slots_RS: Tensor, num_experts: int) -> Tensor:
    """Place of each expert's copy on each rank, int64 [E, R]; its place at home where none is."""
    num_ranks, num_slots = slots_RS.shape
    num_local = num_experts // num_ranks
    experts_E = torch.arange(num_experts, device=slots_RS.device)
    place_ER = (experts_E % num_local)[:, None].repeat(1, num_ranks)
    for slot in range(num_slots):
        holds_ER = slots_RS[:, slot] == experts_E[:, None]
        place_ER = torch.where(holds_ER, num_local + slot, place_ER)
    return place_ER


def check_reroute(
    ids_TK: Tensor, rows_RW: Tensor, slots_RS: Tensor, quota_ER: Tensor, my_rank: int
) -> None:
    """Raise ValueError for shapes that do not belong together. Host only, no sync."""
    num_ranks, num_experts = slots_RS.shape[0], quota_ER.shape[0]
    if quota_ER.shape[1] != num_ranks or rows_RW.shape[0] != num_ranks:
        raise ValueError(
            f"slots of {num_ranks} ranks, quotas of {quota_ER.shape[1]} and rows of "
            f"{rows_RW.shape[0]}: they must be of one plan"
        )
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be split evenly over {num_ranks} ranks")
    if rows_RW.shape[1] < layout.row_width(num_experts, with_histogram=False):
        raise ValueError(f"rows of width {rows_RW.shape[1]} do not hold {num_experts} experts")
    if not 0 <= my_rank < num_ranks:
        raise ValueError(f"my_rank {my_rank} is not one of {num_ranks} ranks")
    if ids_TK.dim() != 2:
        raise ValueError(f"ids of shape {tuple(ids_TK.shape)}: give one row a token")
