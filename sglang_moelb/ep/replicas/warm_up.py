"""Compile all that a layer under the lever replicate launches, before requests come.

The first pass would else stall the other ranks into DeepEP's timeout.

Shape letters: T tokens, N rows, K top-k, R ranks, E experts, S slots of a rank, W row width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_moelb.ep.replicas.memory import LayerExperts
from sglang_moelb.kernels.count_experts import count_layers
from sglang_moelb.kernels.place_replicas import place_replicas
from sglang_moelb.kernels.pull_experts import pull_experts
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.types import Topology

BLOCK = 128  # rows of a group of DeepGEMM
NUM_TOKENS = (16, 16384)  # `reroute` has one kernel for few tokens and one for many


def warm_up(layer: Any, experts: LayerExperts, topology: Topology, rank: int) -> None:
    """Launch every kernel once with rows of zeros, on CUDA; copies this rank's own first expert.

    DeepGEMM compiles for the number of experts with slots, all sizes on the first rank of a host:
    the caller lets the ranks wait for each other.
    """
    num_slots = len(experts.w13) - experts.num_own
    for num_tokens in NUM_TOKENS:
        for dtype in (torch.int32, torch.int64):
            _warm_routing(num_tokens, dtype, topology, num_slots, rank)
    slots_RS = torch.full(
        (topology.num_ranks, num_slots), -1, dtype=torch.int32, device=experts.w13.device
    )
    slots_RS[:, 0] = rank * experts.num_own
    pull_experts(
        (experts.w13_R, experts.w2_R),
        slots_RS,
        (experts.w13[experts.num_own :], experts.w2[experts.num_own :]),
        my_rank=rank,
    )
    wide = SimpleNamespace(w13_weight=experts.w13, w2_weight=experts.w2)
    layer.quant_method.apply(layer=wide, dispatch_output=_some_rows(layer, experts))
    torch.cuda.synchronize()


def _warm_routing(
    num_tokens: int, dtype: torch.dtype, topology: Topology, num_slots: int, rank: int
) -> None:
    ids_TK = torch.zeros(num_tokens, topology.topk, dtype=dtype, device="cuda")
    flags_T = torch.zeros(num_tokens, dtype=torch.uint8, device="cuda")
    row_1W = count_layers(ids_TK[None], flags_T, num_experts=topology.num_experts)
    rows_RW = row_1W.expand(topology.num_ranks, -1).contiguous()
    slots_RS, quota_ER, _ = place_replicas(
        rows_RW, num_experts=topology.num_experts, num_slots=num_slots
    )
    reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=rank)


def _some_rows(layer: Any, experts: LayerExperts) -> Any:
    """As many rows as a group has, all of the first expert."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    weight = experts.w13
    num_places, _, hidden_size = weight.shape
    ids_NK = torch.full((BLOCK, layer.top_k), -1, dtype=torch.int64, device=weight.device)
    ids_NK[:, 0] = 0
    return DeepEPNormalDispatchOutput(
        hidden_states=torch.zeros(BLOCK, hidden_size, dtype=weight.dtype, device=weight.device),
        hidden_states_scale=None,
        topk_ids=ids_NK,
        topk_weights=torch.ones(ids_NK.shape, dtype=torch.float32, device=weight.device),
        num_recv_tokens_per_expert=[BLOCK] + [0] * (num_places - 1),
    )
