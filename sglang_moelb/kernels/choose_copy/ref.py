"""Reference of `choose_copy` in plain torch. Shape letters as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 64  # of a share
STEP = 39  # odd and near UNITS / 1.618, so that positions of neighbours lie far apart


def choose_copy(
    ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, bounds_EB: Tensor, *, shift: int
) -> Tensor:
    """See `sglang_moelb.kernels.choose_copy`. Runs wherever its tensors are."""
    check_choose(ids_TK, copies_EC, num_copies_E, bounds_EB, shift)
    is_routed_TK = (ids_TK >= 0) & (ids_TK < len(copies_EC))
    expert_TK = torch.where(is_routed_TK, ids_TK, 0).long()
    turn_T1 = torch.arange(shift, shift + len(ids_TK), device=ids_TK.device)[:, None]
    bounds_TKB = bounds_EB[expert_TK]
    by_share_TK = (bounds_TKB <= (turn_T1 * STEP % UNITS)[:, :, None]).sum(dim=2)
    by_turn_TK = turn_T1 % num_copies_E[expert_TK]
    copy_TK = torch.where(bounds_TKB[:, :, 0] == 0, by_turn_TK, by_share_TK)
    physical_TK = copies_EC[expert_TK, copy_TK]
    return torch.where(is_routed_TK, physical_TK, -1).to(ids_TK.dtype).contiguous()


def check_choose(
    ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, bounds_EB: Tensor, shift: int
) -> None:
    """Raise ValueError for shapes that do not belong together. Host only, no sync."""
    if ids_TK.dim() != 2:
        raise ValueError(f"ids of shape {tuple(ids_TK.shape)}: give one row a token")
    if copies_EC.dim() != 2 or num_copies_E.shape != copies_EC.shape[:1]:
        raise ValueError(
            f"copies of shape {tuple(copies_EC.shape)} and numbers of shape "
            f"{tuple(num_copies_E.shape)}: give one row and one number an expert"
        )
    if bounds_EB.dim() != 2 or len(bounds_EB) != len(copies_EC) or not bounds_EB.shape[1]:
        raise ValueError(
            f"bounds of shape {tuple(bounds_EB.shape)} for {len(copies_EC)} experts: give one row "
            "an expert, of at least one bound"
        )
    if shift < 0:
        raise ValueError(f"shift {shift}: give 0 or more")
