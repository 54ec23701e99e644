"""Run as a program: SGLang's own top-k on random logits, beside the scores that we take for it.

Writes, after a line `ANSWERS`, a JSON object: for each kind of router the largest relative
difference, over all tokens, between the gate weights of a token and its scores, both divided by
those of its first choice. A process of its own, because SGLang imports without a GPU only in the
stand-in's environment.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import json

import torch
from sglang.srt.layers.moe.topk import TopKConfig, select_experts

from sglang_moelb.ep.start import scoring_of

NUM_TOKENS, NUM_EXPERTS, TOPK = 64, 16, 4
SCORES = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": torch.sigmoid}


def configs(bias_E: torch.Tensor) -> dict[str, TopKConfig]:
    """The routers of the supported models, as their code makes them."""
    groups = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
    whole = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
    v3 = {"correction_bias": bias_E, "routed_scaling_factor": 2.5, "renormalize": True}
    return {
        "qwen3": TopKConfig(TOPK, torch_native=True),
        "deepseek2": TopKConfig(TOPK, renormalize=False, torch_native=True, **whole),
        "deepseek2-groups": TopKConfig(
            TOPK, renormalize=False, routed_scaling_factor=16.0, torch_native=True, **groups
        ),
        "deepseek3": TopKConfig(
            TOPK, scoring_func="sigmoid", torch_native=True, **groups, **v3
        ),
        "deepseek3-unnamed": TopKConfig(TOPK, torch_native=True, **groups, **v3),
        "kimi": TopKConfig(TOPK, scoring_func="sigmoid", torch_native=True, **whole, **v3),
    }


def max_difference(config: TopKConfig, logits_TE: torch.Tensor) -> float:
    """How far the weights are from being proportional to our scores."""
    routed = select_experts(
        hidden_states=logits_TE,
        router_logits=logits_TE,
        topk_config=config,
        layer_id=0,
        num_token_non_padded=None,
        expert_location_dispatch_info=None,
    )
    scores_TK = SCORES[scoring_of(config)](logits_TE).gather(1, routed.topk_ids.long())
    ratio_TK = routed.topk_weights / scores_TK
    return float((ratio_TK / ratio_TK[:, :1] - 1).abs().max())


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    made = configs(0.3 * torch.randn(NUM_EXPERTS, generator=generator))
    answers = {name: max_difference(config, logits) for name, config in made.items()}
    print("ANSWERS")
    print(json.dumps(answers))
