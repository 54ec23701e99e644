"""Sizes of the probe and the transformers configuration that they stand for.

Why these. Released checkpoints store fused experts as [E, in, out]; transformers transposes a
matrix only where its shape differs from its own [E, out, in], SGLang always. A square matrix would
be read in two ways, so the expert size may be neither the hidden size (down projection) nor half
of it (gate and up). Both must be multiples of 128, so 128 and 256 are the smallest pair, and 4
layers of 32 such experts have 12.6 million parameters (25.2 MB in bf16): 15 MB cannot be had,
30 MB can. What is left goes where the tasks are hard, into seeing: a tower of width 96 and depth 4
with its four mergers takes 1.4 million parameters, embeddings and attention 0.5 million. In all
14.5 million, 28.9 MB. A token uses 4 experts of 256, an inner width of 1,024, eight times its
residual stream, so capacity for glyphs, shapes and sums is in the experts, as it should be for a
model whose experts are to be measured.

Shape letters: E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import Qwen3VLMoeConfig

from sglang_moelb.demo.models import CONTEXT_LENGTH, VOCAB_SIZE, make_tokenizer

PATCH = 16
MERGE = 2
ROPE_THETA = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Everything that decides the shape of a probe."""

    hidden: int = 128
    expert: int = 256
    num_experts: int = 32
    topk: int = 4
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vision_hidden: int = 96
    vision_inner: int = 384
    vision_heads: int = 4
    vision_depth: int = 4
    vision_grid: int = 16  # learned position embeddings a side

    def check(self) -> None:
        """Raise ValueError for sizes that the loaders or the kernels cannot take."""
        if self.expert == self.hidden or 2 * self.expert == self.hidden:
            raise ValueError(
                f"expert={self.expert}, hidden={self.hidden}: a square expert matrix is read in "
                "two ways by transformers and SGLang, choose another expert size"
            )
        if self.vision_depth < 3 or self.num_layers < 4:
            raise ValueError(
                f"vision_depth={self.vision_depth}, num_layers={self.num_layers}: three deepstack "
                "layers need 3 or more and, for the last to be read, 4 or more"
            )
        if self.head_dim % 4 or self.vision_hidden // self.vision_heads % 4:
            raise ValueError("head sizes of text and vision must be multiples of 4")


PRESETS = {
    "probe": Sizes(),
    "tiny": Sizes(
        hidden=64, expert=48, num_experts=8, head_dim=16, vision_hidden=32, vision_inner=64,
        vision_depth=3,
    ),
}  # fmt: skip


def make_config(sizes: Sizes) -> Qwen3VLMoeConfig:
    """The configuration of transformers' Qwen3-VL-MoE for `sizes`."""
    sizes.check()
    tokenizer = make_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLMoeConfig(
        text_config=_text(sizes, tokenizer.eos_token_id, tokenizer.pad_token_id),
        vision_config=_vision(sizes),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    return config


def mrope_section(sizes: Sizes) -> list[int]:
    """Frequencies of time, height and width: half, a quarter and a quarter."""
    half = sizes.head_dim // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def as_dict(sizes: Sizes) -> dict[str, int]:
    """Plain numbers, for a checkpoint."""
    return asdict(sizes)


def _text(sizes: Sizes, eos: int, pad: int) -> dict[str, object]:
    rope = {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": mrope_section(sizes),
        "mrope_interleaved": True,
    }
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.expert,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.topk,
        "moe_intermediate_size": sizes.expert,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_parameters": rope,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }


def _vision(sizes: Sizes) -> dict[str, object]:
    return {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "num_heads": sizes.vision_heads,
        "intermediate_size": sizes.vision_inner,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": sizes.vision_grid**2,
        "deepstack_visual_indexes": [0, 1, 2],
        "in_channels": 3,
    }
