"""Write the configuration of a model of the DeepSeek family in released shapes, with few layers.

    python3 -m benchmarks.gpu.write_deepseek --kind deepseek3 --layers 4 --out /tmp/model

Weights are SGLang's dummies. The vocabulary is that of the prompts of `bench_prefill`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHARED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 16384, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_key_value_heads": 16,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    # DeepSeek-V2-Lite
    "deepseek2": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    },
    # DeepSeek-V3's routing and inner size, on the hidden size and heads of V2-Lite
    "deepseek3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "q_lora_rank": 1536, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def main() -> None:
    """Write `config.json` into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--layers", type=int, default=4, help="the first is dense")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = {**SHARED, **KINDS[args.kind], "num_hidden_layers": args.layers}
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
