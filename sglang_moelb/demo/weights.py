"""The weights of the tiny models: random, but lively and skewed on purpose.

Greedy output is varied: matrices of 0.12 and embeddings of 1.0, sharp attention, and attention a
smaller part of the residual stream (transformers' own initialisation repeats one token). It is
printable: the output rows of everything but printable ASCII are zero, so generation ends at its
limit of tokens.

The router is skewed. One direction of the hidden space says "image": the output biases of the
vision tower point along it, the token embeddings a little against it. In each MoE layer the gate
rows of most experts of one half lean towards the direction and those of the other half against
it, and the favoured half alternates from layer to layer. So image tokens crowd on one half of the
experts and text tokens hardly do. Measured at EP 2 with 16 experts and top-4 on three images, max
over mean rank load: 1.5 to 1.8 for image tokens (once 1.2), 1.3 to 1.6 for prompts of one image
and a question, 1.0 to 1.4 for text alone. Which rank is the busy one depends on the layer and on
how much of the batch is images.

Shape letters: H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

HIDDEN_SIZE = 128
WEIGHT_STD = 0.12
QUERY_SCALE = 3.0  # sharp attention: what comes next depends on the whole context
ATTENTION_SHARE = 0.5  # of the residual stream: otherwise all tokens of a context grow alike
IMAGE_LEAN = 2.0  # how far image embeddings lie along the direction, in their own spread
TEXT_LEAN = 0.1  # how far token embeddings lie against it
GATE_LEAN = 0.15  # how far gate rows of layer 0 lean, in the unit of WEIGHT_STD
DEPTH_LEAN = 0.5  # how much further in each layer, relative to layer 0
FAVOURED_SHARE = 0.75  # of the experts of the favoured half lean towards it
CORRECTION_STD = 0.05  # of DeepSeek-V3's bias on the choice of experts, whose scores are sigmoids


def image_direction(generator: torch.Generator) -> torch.Tensor:
    """float32 [H] of -1 and 1: what says "image"; the first draw of a seed."""
    return torch.randn(HIDDEN_SIZE, generator=generator).sign()


def draw_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> None:
    """Fill every matrix in the order of its name, then lean embeddings, gates and vision biases."""
    direction_H = image_direction(generator)
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    printable = tokenizer.convert_tokens_to_ids(alphabet)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, WEIGHT_STD, generator=generator)
            if name.endswith("embed_tokens.weight"):
                parameter.div_(WEIGHT_STD).sub_(TEXT_LEAN * direction_H)
            elif name.endswith("lm_head.weight"):
                keep = torch.zeros(parameter.shape[0], 1)
                keep[printable] = 1.0
                parameter.mul_(keep)
            elif name.endswith("q_norm.weight"):  # Qwen normalises queries, so it scales here
                parameter.fill_(QUERY_SCALE)
            elif name.endswith("q_proj.weight"):
                parameter.mul_(QUERY_SCALE)
            elif name.endswith("o_proj.weight"):
                parameter.mul_(ATTENTION_SHARE)
            elif name.endswith("mlp.gate.weight"):
                parameter.add_(_gate_lean(name, parameter.shape[0]) * direction_H)
            elif "visual" in name and name.endswith("linear_fc2.bias") and "merger" in name:
                parameter.copy_(IMAGE_LEAN * direction_H)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, CORRECTION_STD, generator=generator)


def _gate_lean(name: str, num_experts: int) -> torch.Tensor:
    """[E, 1]: how far each gate row of the layer called `name` leans along the direction."""
    layer = int(name.split("layers.")[1].split(".")[0])
    half = num_experts // 2
    num_towards = round(FAVOURED_SHARE * half)
    favoured = torch.full((half,), -1.0)
    favoured[:num_towards] = 1.0
    halves = (favoured, -favoured) if layer % 2 == 0 else (-favoured, favoured)
    # The residual stream grows with depth, and the direction's share of it shrinks.
    lean = GATE_LEAN * WEIGHT_STD * (1.0 + DEPTH_LEAN * layer)
    return lean * torch.cat(halves).unsqueeze(1)


def transpose_fused_experts(folder: Path) -> None:
    """From [E, out, in], as a fresh model is saved, to the released checkpoints' [E, in, out]."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = tensor.transpose(1, 2).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
