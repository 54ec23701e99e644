"""Tiny mixture-of-experts checkpoints with tokenizer and processor, made from a seed.

Kinds: "text" (Qwen3-MoE), "vl" (Qwen3-VL-MoE with three deepstack layers), "deepseek"
(DeepSeek-V2), "deepseek3" (DeepSeek-V3) and "kimi" (Kimi-VL: MoonViT before a DeepSeek-V3; its
folder brings a processor, so it needs `--trust-remote-code`). They mean nothing, but their greedy
output is varied and printable, and their routers are skewed so that a balancer has work to do: see
`weights`.

Runs on the host and needs transformers; a few seconds a model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from sglang_moelb.demo import deepseek, kimi
from sglang_moelb.demo.kimi_processor import IMAGE_TOKEN
from sglang_moelb.demo.weights import HIDDEN_SIZE, draw_weights, transpose_fused_experts

Kind = Literal["text", "vl", "deepseek", "deepseek3", "kimi"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VERSION = 1  # raise it with any change of what is written
MARKER = "moelb_model.json"

EXPERT_SIZE = 256  # not HIDDEN_SIZE: transformers guesses the layout of fused experts by shape
CONTEXT_LENGTH = 4096
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 256 + 8  # the bytes, the special tokens, rounded up to a multiple of 8

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image_url' in c %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """Everything that decides what is written; kept in the folder's marker."""

    kind: Kind
    seed: int
    num_experts: int
    num_layers: int
    topk: int
    dtype: str
    version: int = VERSION


def write_model(
    kind: Kind,
    folder: str | Path,
    *,
    seed: int = 0,
    num_experts: int = 16,
    num_layers: int = 4,
    topk: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of `kind` into `folder` and return it; at once if it is there already.

    The folder appears complete or not at all, and is replaced when any argument or the version
    differs from what its marker says. Raises ValueError for an unknown kind or sizes that do not
    fit: the vl kind needs at least 3 layers, `num_experts` must be even and at least `topk`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    if num_experts % 2 or not 1 <= topk <= num_experts:
        raise ValueError(f"num_experts={num_experts}, topk={topk}: even, and at least topk")
    if kind == "vl" and num_layers < 3:
        raise ValueError(f"num_layers={num_layers}: vl has three deepstack layers, use 3 or more")
    recipe = _Recipe(
        kind=kind,
        seed=seed,
        num_experts=num_experts,
        num_layers=num_layers,
        topk=topk,
        dtype=str(dtype).removeprefix("torch."),
    )
    folder = Path(folder)
    marker = folder / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == asdict(recipe):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        _write(recipe, Path(scratch), dtype)
        (Path(scratch) / MARKER).write_text(json.dumps(asdict(recipe), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for the context manager to remove
    return folder


def make_tokenizer(image_token: str = "<|image_pad|>") -> PreTrainedTokenizerFast:
    """One token per byte, and Qwen's special tokens; with the chat template of the models.

    `image_token` is what stands for an image, in Qwen's place for it.
    """
    special = [image_token if token == "<|image_pad|>" else token for token in SPECIAL_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = CHAT_TEMPLATE.replace("<|image_pad|>", image_token)
    return fast


def _write(recipe: _Recipe, folder: Path, dtype: torch.dtype) -> None:
    is_kimi = recipe.kind == "kimi"
    tokenizer = make_tokenizer(IMAGE_TOKEN) if is_kimi else make_tokenizer()
    model = _MAKERS[recipe.kind](recipe, tokenizer)
    generator = torch.Generator().manual_seed(recipe.seed)
    draw_weights(model, tokenizer, generator)
    model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if recipe.kind == "vl":
        transpose_fused_experts(folder)
        _make_processor(tokenizer).save_pretrained(folder)
    if is_kimi:
        kimi.wrap_as_kimi(folder, recipe.seed, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _make_text(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_qwen3_sizes(recipe, tokenizer)))


def _make_vl(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 4, 4],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN_SIZE,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
        "in_channels": 3,
    }
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLMoeConfig(
        text_config={**_qwen3_sizes(recipe, tokenizer), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen3VLMoeForConditionalGeneration(config)


def _make_deepseek(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return deepseek.make_v2(recipe.num_experts, _common_sizes(recipe, tokenizer))


def _make_deepseek3(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return deepseek.make_v3(recipe.num_experts, _common_sizes(recipe, tokenizer))


def _make_kimi_text(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = _common_sizes(recipe, tokenizer)
    return deepseek.make_v3(recipe.num_experts, sizes, deepseek.KIMI_ROUTING)


_MAKERS = {
    "text": _make_text,
    "vl": _make_vl,
    "deepseek": _make_deepseek,
    "deepseek3": _make_deepseek3,
    "kimi": _make_kimi_text,
}


def _common_sizes(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 256,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": 4,
        "num_experts_per_tok": recipe.topk,
        "moe_intermediate_size": EXPERT_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _qwen3_sizes(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        **_common_sizes(recipe, tokenizer),
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": recipe.num_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _make_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    # An image becomes 1 to 196 tokens of 32 by 32 pixels.
    size = {"shortest_edge": 32 * 32, "longest_edge": 448 * 448}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )
