"""The reference of the grouped GEMMs on float8 weights and rows: what DeepGEMM computes on Hopper.

Shapes: N received rows, K top-k columns, H hidden size, e local experts, I intermediate size,
J = 2I, G groups of 128. Runs on the host, in float32 on the very float8 values; rounds where the
GPU path rounds: the outputs of both GEMMs to bfloat16, the activation to bfloat16 and to float8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.kernels.fp8 import GROUP
from sglang_moelb.kernels.quantise_rows import silu_mul_quantise


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Experts:
    """Weights e4m3 `[e, J, H]` and `[e, H, I]` with float32 scales of 128x128 blocks."""

    w13_eJH: torch.Tensor
    w13_scale: torch.Tensor
    w2_eHI: torch.Tensor
    w2_scale: torch.Tensor


def run_experts_fp8(
    q_NH: torch.Tensor,
    scale_NG: torch.Tensor,
    topk_ids_NK: torch.Tensor,
    topk_weights_NK: torch.Tensor,
    experts: Fp8Experts,
) -> torch.Tensor:
    """Weighted sum over each row's local experts of `w2 @ (silu(gate) * up)`, bfloat16 [N, H].

    Args:
        q_NH: rows in e4m3. scale_NG: their float32 scales, one for 128 columns.
        topk_ids_NK: integer local expert ids, negative for a selection that is not here.
        topk_weights_NK: float32 weights of the selections.
        experts: the weights of all local experts.

    A row without a local expert is zero; a duplicate counts twice. Only silu, as DeepGEMM's runner.
    """
    x_NH = q_NH.float() * scale_NG.float().repeat_interleave(GROUP, dim=1)
    out_NH = torch.zeros(x_NH.shape, dtype=torch.float32)
    for expert in range(experts.w13_eJH.shape[0]):
        rows, columns = (topk_ids_NK == expert).nonzero(as_tuple=True)
        if not rows.numel():
            continue
        gate_up = x_NH[rows] @ _plain(experts.w13_eJH[expert], experts.w13_scale[expert]).T
        q, scale = silu_mul_quantise(gate_up.bfloat16())
        act = q.float() * scale.repeat_interleave(GROUP, dim=1)
        down = (act @ _plain(experts.w2_eHI[expert], experts.w2_scale[expert]).T).bfloat16()
        weights = topk_weights_NK[rows, columns].float().unsqueeze(-1)
        out_NH.index_add_(0, rows, down.float() * weights)
    return out_NH.bfloat16()


def _plain(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    blocks = scale.repeat_interleave(GROUP, dim=0).repeat_interleave(GROUP, dim=1)
    return weight.float() * blocks
