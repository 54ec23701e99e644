"""A pass without a lever: all its layers counted and exchanged at once, when it ends.

Nothing in such a pass waits for the counts, so they need not cost a launch a layer before each
dispatch, where the device waits for the host. The ids of all layers stay alive until then and are
copied once: 8 bytes a row and layer, 50 MB for 16,384 tokens, top-8 and 48 layers.

Shape letters: L MoE layers, T rows of this rank, K top-k, R ranks, W width of a layer's row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_moelb.ep.exchange import Exchange, SymmetricExchange
from sglang_moelb.kernels.count_experts import count_layers


def observe(
    ids_L: Sequence[torch.Tensor],
    flags_T: torch.Tensor,
    exchange: Exchange | SymmetricExchange,
    *,
    num_experts: int,
) -> torch.Tensor:
    """Every rank's counts of every layer, `[R, L, W]` int32, on the ids' device; no host sync.

    `ids_L` holds one `[T, K]` a layer; all ranks must bring as many. Runs on every rank, also on
    one without tokens, because it ends in a collective. Source: ours.
    """
    rows_LW = count_layers(torch.stack(list(ids_L)), flags_T, num_experts=num_experts)
    num_layers, width = rows_LW.shape
    gathered = exchange.gather(rows_LW.view(-1))
    return gathered.view(-1, num_layers, width)
