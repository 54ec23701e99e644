"""Reference of `quantise_rows` and `silu_mul_quantise` in plain torch. Letters: the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from sglang_moelb.kernels.fp8 import GROUP, quantise

TMA_ALIGNMENT = 4  # float32s in 16 bytes


def quantise_rows(
    x_TH: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs wherever its tensor is."""
    num_rows, num_groups = check_rows(x_TH, GROUP)
    values, scale = quantise(x_TH.contiguous().view(num_rows, num_groups, GROUP), 2)
    scale_TG = empty_scales(num_rows, num_groups, column_major=column_major, device=x_TH.device)
    return values.view(num_rows, num_groups * GROUP), scale_TG.copy_(scale[..., 0])


def silu_mul_quantise(
    gate_up_TN: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs wherever its tensor is."""
    check_rows(gate_up_TN, 2 * GROUP)
    gate_TI, up_TI = gate_up_TN.float().chunk(2, dim=1)
    act_TI = (silu(gate_TI) * up_TI).bfloat16()
    return quantise_rows(act_TI, num_rows_valid=num_rows_valid, column_major=column_major)


def check_rows(x_TH: Tensor, multiple: int) -> tuple[int, int]:
    """Rows and groups of `multiple` columns; ValueError for what cannot be quantised."""
    num_rows, width = x_TH.shape
    if x_TH.dtype != torch.bfloat16:
        raise ValueError(f"rows to quantise are {x_TH.dtype}; they must be torch.bfloat16")
    if width % multiple:
        raise ValueError(f"rows to quantise have {width} columns, no multiple of {multiple}")
    return num_rows, width // multiple


def empty_scales(
    num_rows: int, num_groups: int, *, column_major: bool, device: torch.device
) -> Tensor:
    """Memory for scale_TG in one of the two layouts."""
    if not column_major:
        return torch.empty(num_rows, num_groups, device=device)
    padded_rows = -(-num_rows // TMA_ALIGNMENT) * TMA_ALIGNMENT
    return torch.empty(num_groups, padded_rows, device=device).t()[:num_rows]
