"""Experts of two precisions on the rows of DeepEP's low-latency dispatch, as decode has them.

Runs inside CUDA graphs: no host sync, and what is launched depends on shapes alone. So both grouped
runs take place whether or not their experts have rows.

Shape letters: P places of this rank, high ones first, M rows that DeepEP has room for in each, H
hidden size, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_moelb.ep.expert_rows import dispose, in_dtype
from sglang_moelb.ep.resident.formats import format_of
from sglang_moelb.ep.resident.weights import StoredLayer
from sglang_moelb.kernels.join_rows import join_rows


def run_masked(module: Any, dispatch_output: Any, stored: StoredLayer) -> Any:
    """The experts of `module`: one masked grouped run a precision, each on its places' rows.

    Of a place only its first `masked_m` rows are read and written.
    """
    if stored.low is None:
        return module.quant_method.apply(layer=module, dispatch_output=dispatch_output)
    rows_PMH, num_rows_P = dispatch_output.hidden_states, dispatch_output.masked_m
    num_high, dtype = stored.num_high, rows_PMH.dtype
    high_output = dispatch_output._replace(
        hidden_states=rows_PMH[:num_high], masked_m=num_rows_P[:num_high]
    )
    low_format = format_of(stored.low)
    low_output = low_format.quantised_masked(
        dispatch_output._replace(
            hidden_states=rows_PMH[num_high:], masked_m=num_rows_P[num_high:]
        )
    )
    high = module.quant_method.apply(layer=module, dispatch_output=high_output)
    dispose(rows_PMH)
    low = in_dtype(low_format.run(module, low_output, stored.low), dtype)
    joined_PMH = join_rows(high.hidden_states, low.hidden_states, num_rows_P)
    return high._replace(hidden_states=joined_PMH)


def some_masked_rows(layer: Any, dispatcher: Any, num_places: int) -> Any:
    """A row of zeros for each of `num_places`, as DeepEP's low-latency dispatch lays them out."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput

    weight = layer.w13_weight
    max_rows = dispatcher.num_max_dispatch_tokens_per_rank * dispatcher.group.size()
    device, shape = weight.device, (num_places, max_rows, weight.shape[2])
    return DeepEPLLDispatchOutput(
        hidden_states=torch.zeros(shape, dtype=weight.dtype, device=device),
        hidden_states_scale=None,
        topk_ids=torch.zeros(1, layer.top_k, dtype=torch.int64, device=device),
        topk_weights=torch.ones(1, layer.top_k, dtype=torch.float32, device=device),
        masked_m=torch.ones(num_places, dtype=torch.int32, device=device),
        expected_m=1,
    )
