"""Expert weights of a Hugging Face folder, one expert at a time, on the host.

Knows the two ways in which experts lie there: fused tensors [E, in, out] a layer (Qwen3-VL-MoE), or
three matrices [out, in] an expert (Qwen3-MoE, DeepSeek, Kimi-VL).

Shape letters: E logical experts, J = 2I gate and up, H hidden, I expert size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sglang_moelb.calibrate.types import CalibrateError
from sglang_moelb.stored_formats import MULTIPLE

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Layers of multi-token prediction are numbered after the model's, or from 0 under a name of theirs.
LAYER = r"^(?!(?:.*\.)?mtp\.)(?P<stem>.*\blayers\.(?P<layer>\d+)\.mlp\.experts)\."
FUSED = re.compile(LAYER + r"gate_up_proj$")
SINGLE = re.compile(LAYER + r"(?P<expert>\d+)\.gate_proj\.weight$")
NORM = "post_attention_layernorm.weight"
Shapes = tuple[tuple[int, int], tuple[int, int]]  # of an expert's two projections
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class _Sizes(msgspec.Struct):
    num_hidden_layers: int | None = None


class _ModelConfig(_Sizes):
    text_config: _Sizes | None = None  # of a model with vision


class ExpertTensors(Protocol):
    """What is asked of a checkpoint; layers count MoE layers only, in order."""

    num_layers: int
    num_experts: int
    shapes: Shapes
    item_bytes: int

    def weights(self, layer: int, expert: int) -> tuple[Any, Any]:
        """`[J, H]` and `[H, I]` float32 of an expert."""

    def norm(self, layer: int) -> Any:
        """`[H]` float32, the weight of the norm before the layer's experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Tensors by name, and the stems of the MoE layers' experts in order."""

    tensor: Callable[[str], Any]  # an open slice: get_shape(), get_dtype(), [...]
    names: frozenset[str]
    stems: tuple[str, ...]


def open_checkpoint(folder: Path) -> ExpertTensors:
    """The experts of the checkpoint in `folder`; its files stay open as long as the answer lives.

    Layers beyond the model's own, those of multi-token prediction, are left out: passes do not run
    through them. Raises `CalibrateError` where there are none that can be read.
    """
    if find_spec("safetensors") is None or find_spec("torch") is None:
        raise CalibrateError("--model: reading weights needs torch and safetensors: pip install "
                             "'sglang-moelb[gpu]'")  # fmt: skip
    files = _files(folder)
    tensor = _opened(folder, files)
    names = frozenset(files)
    num_layers = _num_layers(folder)
    stems = _stems(FUSED, names, num_layers)
    if stems:
        return _Fused(_Found(tensor=tensor, names=names, stems=stems))
    stems = _stems(SINGLE, names, num_layers)
    if stems:
        return _Singles(_Found(tensor=tensor, names=names, stems=stems))
    raise CalibrateError(
        f"--model {folder}: holds no experts (no tensor ...layers.N.mlp.experts...). Give the "
        "checkpoint of a Qwen3-MoE, Qwen3-VL-MoE, DeepSeek or Kimi-VL model."
    )


class _Fused:
    """Experts of a layer in two tensors, [E, H, J] and [E, I, H]."""

    def __init__(self, found: _Found) -> None:
        self._found = found
        self.num_layers = len(found.stems)
        self.num_experts, hidden, both = _shape(found, f"{found.stems[0]}.gate_up_proj")
        self.shapes: Shapes = ((both, hidden), (hidden, both // 2))
        self.item_bytes = _item_bytes(found, f"{found.stems[0]}.gate_up_proj")
        _check_blocks(self.shapes)

    def weights(self, layer: int, expert: int) -> tuple[Any, Any]:
        stem = self._found.stems[layer]
        both = self._found.tensor(f"{stem}.gate_up_proj")[expert]
        down = self._found.tensor(f"{stem}.down_proj")[expert]
        return both.float().T.numpy(), down.float().T.numpy()

    def norm(self, layer: int) -> Any:
        return _norm(self._found, layer)


class _Singles:
    """Three matrices an expert."""

    def __init__(self, found: _Found) -> None:
        import torch

        self._cat = torch.cat
        self._found = found
        self.num_layers = len(found.stems)
        first = found.stems[0]
        singles = (SINGLE.match(name) for name in found.names)
        self.num_experts = sum(1 for m in singles if m and m["stem"] == first)
        inner, hidden = _shape(found, f"{first}.0.gate_proj.weight")
        self.shapes: Shapes = ((2 * inner, hidden), (hidden, inner))
        self.item_bytes = _item_bytes(found, f"{first}.0.gate_proj.weight")
        _check_blocks(self.shapes)

    def weights(self, layer: int, expert: int) -> tuple[Any, Any]:
        stem = f"{self._found.stems[layer]}.{expert}"
        gate, up, down = (
            self._found.tensor(f"{stem}.{name}_proj.weight")[:].float()
            for name in ("gate", "up", "down")
        )
        return self._cat([gate, up]).numpy(), down.numpy()

    def norm(self, layer: int) -> Any:
        return _norm(self._found, layer)


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).is_file():
            index: dict[str, dict[str, str]] = msgspec.json.decode((folder / INDEX).read_bytes())
            return index["weight_map"]
        found: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path.name)
    except (OSError, SafetensorError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise CalibrateError(f"--model {folder}: cannot be read ({error}).") from error
    if not found:
        raise CalibrateError(
            f"--model {folder}: holds no *.safetensors. Give the folder of a checkpoint."
        )
    return found


def _opened(folder: Path, files: dict[str, str]) -> Callable[[str], Any]:
    from safetensors import SafetensorError, safe_open

    opened: dict[str, Any] = {}
    stack = ExitStack()

    def tensor(name: str) -> Any:
        try:
            file = files[name]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
            return opened[file].get_slice(name)
        except KeyError as error:
            raise CalibrateError(f"--model {folder}: tensor {name} is missing.") from error
        except (OSError, SafetensorError) as error:
            raise CalibrateError(f"--model {folder}: {name} cannot be read ({error}).") from error

    return tensor


def _num_layers(folder: Path) -> float:
    """The model's own layers; without limit where the checkpoint does not tell."""
    path = folder / CONFIG
    if not path.is_file():
        return math.inf
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_ModelConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise CalibrateError(f"--model {folder}: {CONFIG} cannot be read ({error}).") from error
    told = (config.text_config or config).num_hidden_layers
    return math.inf if told is None else told


def _stems(pattern: re.Pattern[str], names: frozenset[str], num_layers: float) -> tuple[str, ...]:
    """The stems of the model's own MoE layers, in order."""
    layers = {m["stem"]: int(m["layer"]) for m in map(pattern.match, names) if m}
    return tuple(sorted((s for s, at in layers.items() if at < num_layers), key=layers.__getitem__))


def _shape(found: _Found, name: str) -> tuple[int, ...]:
    return tuple(found.tensor(name).get_shape())


def _item_bytes(found: _Found, name: str) -> int:
    dtype = found.tensor(name).get_dtype()
    if dtype not in ITEM_BYTES:
        raise CalibrateError(
            f"--model: its experts are stored as {dtype}: a quantised checkpoint has no lower "
            "precision to pay replicas with. Give the bfloat16 checkpoint."
        )
    return ITEM_BYTES[dtype]


def _check_blocks(shapes: Shapes) -> None:
    if any(size % MULTIPLE for shape in shapes for size in shape):
        raise CalibrateError(
            f"--model: experts of {shapes}: the formats that experts are stored in want hidden and "
            f"expert size to be multiples of {MULTIPLE}."
        )


def _norm(found: _Found, layer: int) -> Any:
    stem = found.stems[layer].removesuffix("mlp.experts")
    return found.tensor(stem + NORM)[:].float().numpy()
