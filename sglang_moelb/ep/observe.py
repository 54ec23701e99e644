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
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Topology

NUM_WARM_UP_ROWS = 16


def observe(
    ids_L: Sequence[torch.Tensor],
    flags_T: torch.Tensor,
    exchange: Exchange | SymmetricExchange,
    *,
    num_experts: int,
    wanted: bool = True,
) -> torch.Tensor | None:
    """Every rank's counts of every layer, `[R, L, W]` int32, on the ids' device; no host sync.

    None on a rank by which they are not `wanted`. `ids_L` holds one `[T, K]` a layer; all ranks
    must bring as many. Runs on every rank, also on one without tokens, because it ends in a
    collective. Source: ours.
    """
    num_layers, width = len(ids_L), row_width(num_experts, with_histogram=False)
    place_W = exchange.place(num_layers * width)
    rows_LW = count_layers(
        torch.stack(list(ids_L)),
        flags_T,
        num_experts=num_experts,
        out_LW=None if place_W is None else place_W.view(num_layers, width),
    )
    row = rows_LW.view(-1) if place_W is None else place_W
    if not wanted:
        exchange.offer(row)
        return None
    return exchange.gather(row).view(-1, num_layers, width)


def warm_up(topology: Topology, device: torch.device) -> None:
    """Compile what `observe` launches on CUDA, which the first prefill would else wait for."""
    if device.type != "cuda":
        return
    flags_T = torch.zeros(NUM_WARM_UP_ROWS, dtype=torch.uint8, device=device)
    for dtype in (torch.int32, torch.int64):
        ids_LTK = torch.zeros(1, NUM_WARM_UP_ROWS, topology.topk, dtype=dtype, device=device)
        count_layers(ids_LTK, flags_T, num_experts=topology.num_experts)
