"""Reference of `choose_copy` in plain torch. Shape letters as in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_copy(ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, *, shift: int) -> Tensor:
    """See `sglang_moelb.kernels.choose_copy`. Runs wherever its tensors are."""
    check_choose(ids_TK, copies_EC, num_copies_E, shift)
    is_routed_TK = (ids_TK >= 0) & (ids_TK < len(copies_EC))
    expert_TK = torch.where(is_routed_TK, ids_TK, 0).long()
    turn_T1 = torch.arange(shift, shift + len(ids_TK), device=ids_TK.device)[:, None]
    physical_TK = copies_EC[expert_TK, turn_T1 % num_copies_E[expert_TK]]
    return torch.where(is_routed_TK, physical_TK, -1).to(ids_TK.dtype).contiguous()


def check_choose(ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, shift: int) -> None:
    """Raise ValueError for shapes that do not belong together. Host only, no sync."""
    if ids_TK.dim() != 2:
        raise ValueError(f"ids of shape {tuple(ids_TK.shape)}: give one row a token")
    if copies_EC.dim() != 2 or num_copies_E.shape != copies_EC.shape[:1]:
        raise ValueError(
            f"copies of shape {tuple(copies_EC.shape)} and numbers of shape "
            f"{tuple(num_copies_E.shape)}: give one row and one number an expert"
        )
    if shift < 0:
        raise ValueError(f"shift {shift}: give 0 or more")
