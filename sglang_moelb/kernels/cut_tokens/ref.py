"""Reference of `cut_tokens` in plain torch. Shape letters as in the package, K top-k, X
added columns, N rows in cut bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout

MAX_WEIGHT = float(1 << 15)  # masses of 2**32 rows stay below 2**63


def cut_tokens(
    ids_TC: Tensor,
    weights_TC: Tensor,
    keys_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    cut_bin_G: Tensor,
    cut_quota_G: Tensor,
    *,
    num_experts: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sglang_moelb.kernels.cut_tokens`. Runs wherever its tensors are."""
    group_size = experts_per_group(num_experts, cut_bin_G.numel())
    valid_TC = (ids_TC >= 0) & (ids_TC < num_experts)
    groups_TC = (ids_TC.where(valid_TC, 0) // group_size).long()
    cut_bin_TC = cut_bin_G[groups_TC]
    bins_TC = keys_TC >> layout.BIN_SHIFT
    may_drop_TC = valid_TC & (cut_bin_TC >= 0)
    may_drop_TC &= ((flags_T & layout.FLAG_PROTECTED) == 0)[:, None]
    dropped_TC = may_drop_TC & (bins_TC < cut_bin_TC)
    in_cut_bin = (may_drop_TC & (bins_TC == cut_bin_TC)).nonzero(as_tuple=True)
    amounts_N = None if amounts_T is None else amounts_T[in_cut_bin[0]]
    dropped_TC[in_cut_bin] = ~_fits(
        groups_TC[in_cut_bin], keys_TC[in_cut_bin], amounts_N, cut_quota_G
    )
    stats_8 = _stats(valid_TC, dropped_TC, weights_TC, flags_T, topk)
    return ids_TC.masked_fill(dropped_TC, -1), weights_TC.masked_fill(dropped_TC, 0.0), stats_8


def experts_per_group(num_experts: int, num_groups: int) -> int:
    """E / G, or ValueError. Host only."""
    if num_groups == 0 or num_experts % num_groups:
        raise ValueError(f"{num_experts} experts cannot be split evenly in {num_groups} groups")
    return num_experts // num_groups


def _fits(
    groups_N: Tensor, keys_N: Tensor, amounts_N: Tensor | None, cut_quota_G: Tensor
) -> Tensor:
    """Which rows of the cut bins, given by flat index ascending, are within their group's quota."""
    order_N = ((groups_N << layout.KEY_BITS) + (layout.MAX_KEY - keys_N)).argsort(stable=True)
    amounts_N = torch.ones_like(groups_N) if amounts_N is None else amounts_N.long()
    per_group_G = torch.zeros_like(cut_quota_G, dtype=torch.int64)
    per_group_G.scatter_add_(0, groups_N, amounts_N)
    before_G = per_group_G.cumsum(0) - per_group_G
    groups_N = groups_N[order_N]
    within_N = amounts_N[order_N].cumsum(0) - before_G[groups_N]
    fits_N = torch.empty_like(order_N, dtype=torch.bool)
    fits_N[order_N] = within_N <= cut_quota_G[groups_N]
    return fits_N


def _stats(
    valid_TC: Tensor, dropped_TC: Tensor, weights_TC: Tensor, flags_T: Tensor, topk: int
) -> Tensor:
    weights_TC = weights_TC.nan_to_num(nan=0.0).clamp(-MAX_WEIGHT, MAX_WEIGHT)
    mass_TC = (weights_TC * layout.MASS_ONE).round().long() * valid_TC
    lost_TK = dropped_TC[:, :topk]
    added_TX = (valid_TC & ~dropped_TC)[:, topk:]
    lost_vision_TK = lost_TK & ((flags_T & layout.FLAG_VISION) != 0)[:, None]
    stats_8 = torch.zeros(8, dtype=torch.int64, device=weights_TC.device)
    stats_8[0] = mass_TC[:, :topk].sum()
    stats_8[1] = (mass_TC[:, :topk] * lost_TK).sum()
    stats_8[2] = (mass_TC[:, topk:] * added_TX).sum()
    stats_8[3] = lost_TK.sum()
    stats_8[4] = added_TX.sum()
    stats_8[5] = lost_vision_TK.sum()
    return stats_8
