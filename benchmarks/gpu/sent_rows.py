"""DeepEP's dispatch and combine as SGLang's normal mode calls them, without SGLang's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.one_layer import ALIGNMENT
from sglang_moelb.ep.balance import LayerInput

NVL_BYTES = 64 << 20


def make_buffer(device: torch.device, hidden: int, num_ranks: int) -> Any:
    """DeepEP's `Buffer` over all ranks, on a CPU its stand-in; collective."""
    if device.type == "cpu":
        from sglang_moelb.ep.standin.deep_ep_buffer import Buffer as StandIn

        return StandIn(dist.group.WORLD)
    from deep_ep import Buffer

    configs = (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks))
    hint = max(config.get_nvl_buffer_size_hint(2 * hidden, num_ranks) for config in configs)
    return Buffer(dist.group.WORLD, max(hint, NVL_BYTES), 0)


def dispatch(
    buffer: Any, routed: LayerInput, ids_TK: torch.Tensor, num_experts: int
) -> tuple[Any, Any]:
    """Send the rows of `routed` by `ids_TK` of `num_experts`; what arrives, and the way home."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    per_rank, per_rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(
        ids_TK,
        num_experts,
        previous_event=buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    rows, ids, weights, counts, handle, event = buffer.dispatch(
        routed.hidden_TD,
        topk_idx=ids_TK,
        topk_weights=routed.weights_TK,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=ALIGNMENT,
    )
    event.current_stream_wait()
    return DeepEPNormalDispatchOutput(rows, None, ids, weights, counts), handle


def combine(buffer: Any, computed: Any, handle: Any) -> torch.Tensor:
    """The rows that SGLang's runner has `computed`, summed at home."""
    out, _, event = buffer.combine(
        computed.hidden_states,
        handle,
        async_finish=True,
        previous_event=buffer.capture(),
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    rows: torch.Tensor = out
    return rows
