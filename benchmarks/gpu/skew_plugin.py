"""A plugin for benchmarks: replaces top-k ids so that one rank, rotating by layer, is hot.

Every token gets `topk * skew / num_ranks` experts of the hot rank and the rest from the others, all
distinct, so the rank rows are exactly `skew` times the mean. The skew is read from the file named
by MOELB_BENCH_SKEW at each pass, so that one server can be measured at several. With
MOELB_BENCH_VISION set, a balanced server takes every token for vision. SGLang's dummy weights, with
which all log-probabilities are those of chance, are scaled until experts count in them.

Shape letters: T tokens, K top-k, R ranks.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VARIABLE, VISION_VARIABLE = "MOELB_BENCH_SKEW", "MOELB_BENCH_VISION"
MAX_TOKENS = 65536
WEIGHT_SCALE = 30.0  # from 0.001 to 0.03 at most, the usual size at initialisation
_current = {"stamp": 0, "skew": 0.0}


def register() -> None:
    """Entry point of SGLang's plugin loader; does nothing unless the variable is set."""
    if VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.forward_impl", _skewed, HookType.BEFORE
    )
    HookRegistry.register(
        "sglang.srt.model_loader.loader.initialize_dummy_weights", _scaled, HookType.AFTER
    )
    if os.environ.get(VISION_VARIABLE):
        _all_vision()


def _all_vision() -> None:
    from sglang_moelb.ep.open_pass import PassOpener
    from sglang_moelb.kernels.row_layout import FLAG_VISION

    flags_of = PassOpener._flags
    PassOpener._flags = lambda *args: flags_of(*args) | FLAG_VISION  # type: ignore[method-assign]


def _scaled(result: None, model: torch.nn.Module) -> None:
    for name, weight in model.state_dict().items():
        if "norm" in name:
            weight.fill_(1.0)
        elif torch.is_floating_point(weight):
            weight.mul_(WEIGHT_SCALE)


def _skewed(layer: Any, hidden_states: Any, topk_output: Any) -> tuple[Any, Any] | None:
    skew = imposed_skew()
    num_tokens, topk = topk_output.topk_ids.shape
    if not skew or num_tokens < 64:
        return None
    from sglang.srt.runtime_context import get_parallel

    num_ranks = get_parallel().moe_ep_size
    ids = skewed_ids(
        skew, layer.layer_id % num_ranks, num_ranks, layer.num_experts, topk,
        topk_output.topk_ids.device.index,
    )[:num_tokens].to(topk_output.topk_ids.dtype)  # fmt: skip
    ids = torch.where(topk_output.topk_ids >= 0, ids, topk_output.topk_ids)
    return (layer, hidden_states, topk_output._replace(topk_ids=ids)), {}


def imposed_skew() -> float:
    """What the file says now, 0 for the router's own ids; read again when it has been written."""
    path = Path(os.environ[VARIABLE])
    stamp = path.stat().st_mtime_ns
    if stamp != _current["stamp"]:
        _current.update(stamp=stamp, skew=float(path.read_text()))
    return float(_current["skew"])


@lru_cache(maxsize=64)
def skewed_ids(
    skew: float, hot: int, num_ranks: int, num_experts: int, topk: int, device: int | None
) -> torch.Tensor:
    """int64 `[MAX_TOKENS, K]` distinct experts, `topk * skew / num_ranks` of them on rank `hot`."""
    num_hot = round(topk * skew / num_ranks)
    per_rank = num_experts // num_ranks
    generator = torch.Generator().manual_seed(1000 * hot + num_hot)
    order = torch.rand(MAX_TOKENS, num_experts, generator=generator)
    is_hot = torch.zeros(num_experts, dtype=torch.bool)
    is_hot[hot * per_rank : (hot + 1) * per_rank] = True
    hot_ids = order.masked_fill(~is_hot, -1).topk(max(num_hot, 1), dim=1).indices[:, :num_hot]
    cold_ids = order.masked_fill(is_hot, -1).topk(topk - num_hot, dim=1).indices
    ids = torch.cat([hot_ids, cold_ids], dim=1)
    return ids if device is None else ids.to(f"cuda:{device}")
