"""Compile all that a layer under the lever replicate launches, before requests come.

The first pass would else stall the other ranks into DeepEP's timeout.

Shape letters: T tokens, K top-k, R ranks, E experts, S slots of a rank, W row width, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moelb.ep.low.attach import some_rows
from sglang_moelb.ep.replicas.lever import DISPATCH_DTYPE
from sglang_moelb.ep.replicas.memory import LayerExperts
from sglang_moelb.kernels.count_experts import count_layers
from sglang_moelb.kernels.place_replicas import place_replicas
from sglang_moelb.kernels.pull_experts import pull_experts
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.types import Topology

NUM_TOKENS = (16, 16384)  # `reroute` has one kernel for few tokens and one for many


def warm_up(
    layer: Any, experts_L: Sequence[LayerExperts], topology: Topology, rank: int
) -> None:
    """Launch every kernel once with rows of zeros, on CUDA; `layer` is SGLang's first.

    DeepGEMM compiles for the number of experts with slots, all sizes on the first rank of a host:
    the caller lets the ranks wait for each other.
    """
    experts = experts_L[0]
    num_places = len(experts.w13)
    for num_tokens in NUM_TOKENS:
        for dtype in (torch.int32, torch.int64):
            _warm_routing(num_tokens, dtype, topology, num_places - experts.num_own, rank)
    pull_in_all_layers(experts_L, topology, rank)
    wide = SimpleNamespace(w13_weight=experts.w13, w2_weight=experts.w2)
    layer.quant_method.apply(layer=wide, dispatch_output=some_rows(layer, num_places))
    torch.cuda.synchronize()


def pull_in_all_layers(
    experts_L: Sequence[LayerExperts], topology: Topology, rank: int
) -> None:
    """Pull this rank's own first expert into slot 0, layer by layer.

    The first pull of a layer brings its addresses to the device, which waits for the host: not in
    a pass.
    """
    for experts in experts_L:
        num_own = experts.num_own
        slots_RS = torch.full(
            (topology.num_ranks, len(experts.w13) - num_own),
            -1,
            dtype=torch.int32,
            device=experts.w13.device,
        )
        slots_RS[:, 0] = rank * num_own
        pull_experts(
            (experts.w13_R, experts.w2_R),
            slots_RS,
            (experts.w13[num_own:], experts.w2[num_own:]),
            my_rank=rank,
        )


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
    reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=rank, dtype=DISPATCH_DTYPE)
