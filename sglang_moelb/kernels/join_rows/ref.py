"""Reference of `join_rows` in plain torch. Shape letters as in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def join_rows(first_aMH: Tensor, second_bMH: Tensor, num_rows_e: Tensor) -> Tensor:
    """See `sglang_moelb.kernels.join_rows`. Runs wherever its tensors are."""
    check_join(first_aMH, second_bMH, num_rows_e)
    return torch.cat([first_aMH, second_bMH])


def check_join(first_aMH: Tensor, second_bMH: Tensor, num_rows_e: Tensor) -> None:
    """Raise ValueError for tensors that do not belong together. Host only, no sync."""
    first, second = first_aMH.shape, second_bMH.shape
    if len(first) != 3 or first[1:] != second[1:] or first_aMH.dtype != second_bMH.dtype:
        raise ValueError(
            f"rows of {first_aMH.dtype} {tuple(first)} and {second_bMH.dtype} {tuple(second)}: "
            "only their numbers of experts may differ"
        )
    if num_rows_e.shape != (first[0] + second[0],) or num_rows_e.dtype != torch.int32:
        raise ValueError(
            f"{first[0]} and {second[0]} experts, their numbers of rows are {num_rows_e.dtype} "
            f"{tuple(num_rows_e.shape)}: give one int32 an expert"
        )
    if not (first_aMH.is_contiguous() and second_bMH.is_contiguous()):
        raise ValueError("rows to join must be contiguous, as a grouped GEMM leaves them")
