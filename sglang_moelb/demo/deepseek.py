"""Tiny text models of the DeepSeek family: latent attention, a dense first layer, a shared expert.

V2 routes by softmax over all experts. V3 routes as released: sigmoid scores, a bias that corrects
the choice and not the weight, experts in groups of which the best are searched, weights
renormalised and scaled. Host only.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

V2_ROUTING = {
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
V3_ROUTING = {
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
# As released: Kimi-VL's text model searches one group.
KIMI_ROUTING = {**V3_ROUTING, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446}


def make_v2(num_experts: int, sizes: dict[str, Any]) -> PreTrainedModel:
    """A DeepSeek-V2 of the common `sizes`, not yet drawn."""
    return DeepseekV2ForCausalLM(DeepseekV2Config(**_sizes(num_experts, sizes), **V2_ROUTING))


def make_v3(
    num_experts: int, sizes: dict[str, Any], routing: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A DeepSeek-V3 of the common `sizes`, not yet drawn; `routing` replaces V3_ROUTING."""
    config = DeepseekV3Config(**_sizes(num_experts, sizes), **(routing or V3_ROUTING))
    return DeepseekV3ForCausalLM(config)


def _sizes(num_experts: int, sizes: dict[str, Any]) -> dict[str, Any]:
    # As released: on a CPU SGLang knows no other rotary embedding for these models.
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": sizes["max_position_embeddings"] // 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    return {
        **sizes,
        "rope_parameters": rope,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": num_experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    }
