"""The reference expert computation: what the grouped GEMMs of DeepGEMM compute, in plain torch.

Shapes: N received rows, K top-k columns, H hidden size, e local experts,
I intermediate size, J = 2I.
Runs on the host; rounds where the GPU path rounds (the GEMMs' outputs and the activation in the
dtype of the weights, the weighted sum in float32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def run_experts(
    x_NH: torch.Tensor,
    topk_ids_NK: torch.Tensor,
    topk_weights_NK: torch.Tensor,
    w13_eJH: torch.Tensor,
    w2_eHI: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """Weighted sum over each row's local experts of `w2 @ (act(gate) * up)`.

    Args:
        x_NH: rows, in the dtype of the weights.
        topk_ids_NK: integer local expert ids, negative for a selection that is not here.
        topk_weights_NK: float32 weights of the selections.
        w13_eJH: gate rows, then up rows, J = 2I. w2_eHI: down projection.
        activation: "silu" or "gelu".

    Returns:
        [N, H] in the dtype of x, zero for rows without a local expert. Every selection counts, a
        duplicate twice.

    Example: one row x, ids [[1, -1]], weights [[0.5, 0.0]] give 0.5 * expert_1(x).
    """
    act = ACTIVATIONS[activation]
    num_columns = topk_ids_NK.shape[1]
    flat_ids = topk_ids_NK.reshape(-1)
    # Sorted by expert and, within one, by row: nothing else decides the order of the sum.
    order = flat_ids.to(torch.int64).argsort(stable=True)
    num_absent = int((flat_ids < 0).sum())
    counts = torch.bincount(flat_ids[flat_ids >= 0], minlength=w13_eJH.shape[0]).tolist()
    out_NH = torch.zeros(x_NH.shape, dtype=torch.float32)
    weights = topk_weights_NK.reshape(-1).to(torch.float32)
    for expert, selections in enumerate(order[num_absent:].split(counts)):
        if not selections.numel():
            continue
        rows = selections // num_columns
        gate, up = F.linear(x_NH[rows], w13_eJH[expert]).chunk(2, dim=-1)
        down = F.linear(act(gate) * up, w2_eHI[expert])
        out_NH.index_add_(0, rows, down.float() * weights[selections].unsqueeze(-1))
    return out_NH.to(x_NH.dtype)
