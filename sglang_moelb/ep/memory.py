"""The memory ledger: what we hold on this rank, and how many tokens the KV cache lost to it.

It is held before SGLang sizes its KV cache from what is left. DeepEP's buffers come with the first
dispatch, after that, and cost the KV cache nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

logger = logging.getLogger("sglang_moelb")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLedger:
    """Bytes by what they are for; `kv_token_bytes` is what a token takes in the KV cache.

    The experts' own bytes are those that a resident placement found and left; 0 without one.
    """

    staging_bytes: int = 0
    resident_bytes: int = 0
    replicas_bytes: int = 0
    kv_token_bytes: int = 0
    experts_bytes_before: int = 0
    experts_bytes_after: int = 0

    @property
    def held_bytes(self) -> int:
        """All that we hold, without DeepEP's buffers."""
        return self.staging_bytes + self.resident_bytes + self.replicas_bytes

    @property
    def kv_tokens_lost(self) -> int:
        """Tokens of this rank's KV cache for which there is no room, rounded up."""
        return -(-self.held_bytes // self.kv_token_bytes) if self.kv_token_bytes else 0

    def told(self) -> dict[str, int]:
        """As the status has it, with DeepEP's buffers as far as they exist."""
        return {
            "staging_bytes": self.staging_bytes,
            "resident_bytes": self.resident_bytes,
            "replicas_bytes": self.replicas_bytes,
            "deepep_bytes": deepep_bytes(),
            "experts_bytes_before": self.experts_bytes_before,
            "experts_bytes_after": self.experts_bytes_after,
            "kv_tokens_lost": self.kv_tokens_lost,
        }

    @property
    def kv_tokens_won(self) -> int:
        """Tokens of this rank's KV cache that a resident placement has made room for."""
        freed = self.experts_bytes_before - self.experts_bytes_after
        return freed // self.kv_token_bytes if self.kv_token_bytes else 0

    def log(self) -> None:
        """Write `line` to the log, unless neither a lever nor a resident placement holds any."""
        if self.held_bytes or self.experts_bytes_after:
            logger.info("sglang_moelb: %s", self.line())

    def line(self) -> str:
        """What is held and what it costs, for the log."""
        parts = [
            f"{self.staging_bytes / MIB:.0f} MiB staging",
            f"{self.resident_bytes / MIB:.0f} MiB resident low-precision copies",
            f"{self.replicas_bytes / MIB:.0f} MiB replicas",
            f"{deepep_bytes() / MIB:.0f} MiB DeepEP's buffers"
            if _deepep_buffer()
            else "DeepEP's buffers not yet, they come with the first dispatch",
        ]
        costs = f"the KV cache has {self.kv_tokens_lost} tokens less, none for DeepEP's buffers"
        if self.experts_bytes_after:
            parts.append(
                f"{self.experts_bytes_after / MIB:.1f} MiB experts, "
                f"{self.experts_bytes_before / MIB:.1f} before resident.placement"
            )
            costs += f", and {self.kv_tokens_won} more for experts stored low"
        return f"memory of this rank: {', '.join(parts)}; {costs}"


def deepep_bytes() -> int:
    """Memory of DeepEP's buffers on this rank; 0 before the first dispatch."""
    buffer = _deepep_buffer()
    return sum(int(getattr(buffer, name, 0)) for name in ("num_nvl_bytes", "num_rdma_bytes"))


def _deepep_buffer() -> Any:
    """DeepEP's buffer of this process; None before the first dispatch."""
    from sglang.srt.runtime_context import get_resources

    return getattr(get_resources().buffers.get("deepep_ep_state"), "buffer", None)


def with_replicas(ledger: MemoryLedger, num_bytes: int, model_runner: Any) -> MemoryLedger:
    """`ledger` with `num_bytes` of slots for copies of experts."""
    if not num_bytes:
        return ledger
    return replace(
        ledger,
        replicas_bytes=num_bytes,
        kv_token_bytes=ledger.kv_token_bytes or kv_token_bytes_of(model_runner),
    )


def with_experts(ledger: MemoryLedger, before: int, after: int, model_runner: Any) -> MemoryLedger:
    """`ledger` with all experts' bytes `before` and `after` a resident placement; 0 without one."""
    if not after:
        return ledger
    return replace(
        ledger,
        experts_bytes_before=before,
        experts_bytes_after=after,
        kv_token_bytes=ledger.kv_token_bytes or kv_token_bytes_of(model_runner),
    )


def kv_token_bytes_of(model_runner: Any) -> int:
    """`kv_token_bytes` of this process's model and cache."""
    from sglang.srt.runtime_context import get_model, get_parallel

    return kv_token_bytes(
        model_runner.model_config,
        attn_tp_size=get_parallel().attn_tp_size,
        kv_cache_dtype=str(get_model().kv_cache_dtype),
    )


def kv_token_bytes(model_config: Any, *, attn_tp_size: int, kv_cache_dtype: str) -> int:
    """What a token takes in a rank's KV cache: all layers, keys and values, or MLA's latent rows.

    Runs at load, on the host. Without the scales that fp4 caches hold beside.
    """
    item_bytes = torch.empty((), dtype=model_config.dtype).element_size()
    if kv_cache_dtype.startswith("fp8"):
        item_bytes = 1
    text = model_config.hf_text_config
    if getattr(text, "kv_lora_rank", None):
        width = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        heads = model_config.get_num_kv_heads(attn_tp_size)
        width = heads * (model_config.head_dim + model_config.v_head_dim)
    return int(width * model_config.num_hidden_layers * item_bytes)
