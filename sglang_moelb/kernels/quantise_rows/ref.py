"""Reference of `quantise_rows` and its siblings in plain torch. Letters: the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from sglang_moelb.kernels.fp8 import FP8_MAX, GROUP, MIN_AMAX, quantise

TMA_ALIGNMENT = 4  # float32s in 16 bytes
WORD_GROUPS = 4  # scale bytes in an int32
NAN_BYTE = 255  # of e8m0


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


def quantise_masked_rows(x_eMH: Tensor, num_rows_e: Tensor) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs wherever its tensors are."""
    num_experts, max_rows, num_groups = check_masked(x_eMH, num_rows_e)
    q_TH, scale_TG = quantise_rows(x_eMH.reshape(-1, x_eMH.shape[2]))
    scale_eMG = empty_masked_scales(num_experts, max_rows, num_groups, x_eMH.device)
    return q_TH.view(x_eMH.shape), scale_eMG.copy_(scale_TG.view(scale_eMG.shape))


def quantise_rows_ue8m0(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.quantise_rows`. Runs wherever its tensor is."""
    num_rows, num_groups = check_rows(x_TH, GROUP)
    groups = x_TH.float().reshape(num_rows, num_groups, GROUP)
    amax_TG = groups.abs().amax(2)
    is_finite_TG = amax_TG.isfinite()
    # By a tensor, since torch multiplies by the inverse of a number on CUDA, which rounds apart.
    bits = (amax_TG.clamp(min=MIN_AMAX) / torch.full_like(amax_TG, FP8_MAX)).view(torch.int32)
    byte_TG = (bits >> 23) + ((bits & 0x7FFFFF) > 0).int()
    factor_TG = ((254 - byte_TG) << 23).view(torch.float32)  # 2**(127 - byte)
    scaled = groups * factor_TG.where(is_finite_TG, torch.nan)[..., None]
    scale_TW = empty_words(num_rows, num_groups, x_TH.device)
    byte_TG = byte_TG.where(is_finite_TG, NAN_BYTE)
    scale_TW.view(torch.uint8)[:, :num_groups] = byte_TG.to(torch.uint8)
    return scaled.to(torch.float8_e4m3fn).view(num_rows, num_groups * GROUP), scale_TW


def empty_words(num_rows: int, num_groups: int, device: torch.device) -> Tensor:
    """Memory for scale_TW, in which bytes of no group are 0."""
    make = torch.zeros if num_groups % WORD_GROUPS else torch.empty
    return make(num_rows, -(-num_groups // WORD_GROUPS), dtype=torch.int32, device=device)


def check_masked(x_eMH: Tensor, num_rows_e: Tensor) -> tuple[int, int, int]:
    """Experts, rows of one and groups of columns; ValueError for what does not belong together."""
    num_experts, max_rows, _ = x_eMH.shape
    if num_rows_e.shape != (num_experts,) or num_rows_e.dtype != torch.int32:
        raise ValueError(
            f"rows of {num_experts} experts, their numbers are {num_rows_e.dtype} "
            f"{tuple(num_rows_e.shape)}: give one int32 an expert"
        )
    if max_rows % TMA_ALIGNMENT:
        raise ValueError(f"room for {max_rows} rows an expert, no multiple of {TMA_ALIGNMENT}")
    return num_experts, max_rows, check_rows(x_eMH[0], GROUP)[1] if num_experts else 0


def empty_masked_scales(
    num_experts: int, max_rows: int, num_groups: int, device: torch.device
) -> Tensor:
    """Memory for scale_eMG, along the rows of an expert."""
    return torch.empty(num_experts, num_groups, max_rows, device=device).transpose(1, 2)


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
