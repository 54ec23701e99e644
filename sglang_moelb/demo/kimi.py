"""A tiny Kimi-VL around a saved DeepSeek-V3 text model: MoonViT, projector, configuration, code.

transformers has no Kimi-VL, so the checkpoint is written as the released ones are named, from a
seed. Host only.

Shape letters: H hidden size of the text model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang_moelb.demo import kimi_processor
from sglang_moelb.demo.weights import HIDDEN_SIZE, IMAGE_LEAN, WEIGHT_STD, image_direction

WIDTH = 64
MLP_WIDTH = 128
NUM_BLOCKS = 2
PATCH_SIZE = 14
GRID_SIZE = 8
MERGE = 2
VISION = {
    "model_type": "moonvit",
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_BLOCKS,
    "patch_size": PATCH_SIZE,
    "init_pos_emb_height": GRID_SIZE,
    "init_pos_emb_width": GRID_SIZE,
    "merge_kernel_size": [MERGE, MERGE],
}
PROCESSOR_MODULE = "kimi_processor"


def wrap_as_kimi(folder: Path, seed: int, image_token_id: int) -> None:
    """Turn the text checkpoint in `folder` into a Kimi-VL one whose image token has that id."""
    config = json.loads((folder / "config.json").read_text())
    path = folder / "model.safetensors"
    text = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    dtype = getattr(torch, config["dtype"])
    generator = torch.Generator().manual_seed(seed)
    vision = {name: tensor.to(dtype) for name, tensor in _vision_weights(generator).items()}
    save_file(text | vision, path, metadata={"format": "pt"})
    kimi = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "dtype": config["dtype"],
        "media_placeholder_token_id": image_token_id,
        "pad_token_id": config["pad_token_id"],
        "eos_token_id": config["eos_token_id"],
        "text_config": config,
        "vision_config": VISION,
        "vocab_size": config["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(kimi, indent=1) + "\n")
    _write_processor(folder)


def _write_processor(folder: Path) -> None:
    shutil.copy(kimi_processor.__file__, folder / f"{PROCESSOR_MODULE}.py")
    image = f"{PROCESSOR_MODULE}.{kimi_processor.TinyKimiImageProcessor.__name__}"
    whole = f"{PROCESSOR_MODULE}.{kimi_processor.TinyKimiProcessor.__name__}"
    places = {"AutoImageProcessor": image, "AutoProcessor": whole}
    for file, name in (("preprocessor_config.json", image), ("processor_config.json", whole)):
        kind = "image_processor_type" if name is image else "processor_class"
        content = {"auto_map": places, kind: name.rpartition(".")[2]}
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")


def _vision_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Names and tensors of tower and projector; the projector's bias leans to "image"."""
    direction_H = image_direction(generator)
    merged = WIDTH * MERGE * MERGE
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj": (WIDTH, 3, PATCH_SIZE, PATCH_SIZE),
        "multi_modal_projector.linear_1": (merged, merged),
        "multi_modal_projector.linear_2": (HIDDEN_SIZE, merged),
    }
    norms = ["vision_tower.encoder.final_layernorm", "multi_modal_projector.pre_norm"]
    for layer in range(NUM_BLOCKS):
        block = f"vision_tower.encoder.blocks.{layer}"
        shapes |= {f"{block}.wqkv": (3 * WIDTH, WIDTH), f"{block}.wo": (WIDTH, WIDTH)}
        shapes |= {f"{block}.mlp.fc0": (MLP_WIDTH, WIDTH), f"{block}.mlp.fc1": (WIDTH, MLP_WIDTH)}
        norms += [f"{block}.norm0", f"{block}.norm1"]
    weights = {}
    for name, shape in sorted(shapes.items()):
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * WEIGHT_STD
        weights[f"{name}.bias"] = torch.zeros(shape[0])
    for name in norms:
        weights[f"{name}.weight"] = torch.ones(WIDTH)
        weights[f"{name}.bias"] = torch.zeros(WIDTH)
    positions = torch.randn(GRID_SIZE, GRID_SIZE, WIDTH, generator=generator)
    weights["vision_tower.patch_embed.pos_emb.weight"] = positions * WEIGHT_STD
    weights["multi_modal_projector.linear_2.bias"] = IMAGE_LEAN * direction_H
    return weights
