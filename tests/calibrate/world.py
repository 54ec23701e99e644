"""Checkpoints and traces for the tests of calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace
from sglang_moelb.types import Topology

TOPOLOGY = Topology(num_layers=2, num_experts=8, num_ranks=2, topk=2)
HIDDEN, INNER = 128, 128


def fused_tensors(topology: Topology = TOPOLOGY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Experts as Qwen3-VL-MoE's checkpoints have them, [E, in, out]."""
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(topology.num_layers):
        stem = f"model.language_model.layers.{layer}."
        shapes = {
            "mlp.experts.gate_up_proj": (topology.num_experts, HIDDEN, 2 * INNER),
            "mlp.experts.down_proj": (topology.num_experts, INNER, HIDDEN),
            "post_attention_layernorm.weight": (HIDDEN,),
        }
        for name, shape in shapes.items():
            tensors[stem + name] = torch.randn(shape, generator=drawn).bfloat16()
    return tensors


def single_tensors(fused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same experts as Qwen3-MoE's checkpoints have them, one by one, [out, in]."""
    tensors = {}
    for name, tensor in fused.items():
        stem = name.replace("model.language_model.", "model.")
        if not stem.endswith("_proj"):
            tensors[stem] = tensor
            continue
        parts = ("gate", "up") if "gate_up" in stem else ("down",)
        for expert, matrix in enumerate(tensor):
            for part, piece in zip(parts, matrix.chunk(len(parts), dim=1), strict=True):
                key = f"{stem.rpartition('.')[0]}.{expert}.{part}_proj.weight"
                tensors[key] = piece.T.contiguous()
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder with these tensors, by default fused experts of TOPOLOGY."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or fused_tensors(), folder / "model.safetensors")
    return folder


def write_trace(folder: Path, topology: Topology = TOPOLOGY, num_passes: int = 40) -> Path:
    """A skewed load whose hot spots hardly move."""
    load = SyntheticLoad(
        topology=topology, num_passes=num_passes, tokens_per_rank=400, alpha=1.1, drift=0.02
    )
    synthesise_trace(folder, load)
    return folder
