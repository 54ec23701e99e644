"""A trained probe as a Hugging Face folder, and such a folder as a probe again.

The folder is what transformers' `from_pretrained` and SGLang load unchanged: bf16 weights with
fused experts as released checkpoints have them, [E, in, out]; configuration, tokenizer, chat
template and processor. Host.

Shape letters: E experts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig

from benchmarks.probe.encode import BYTE_IDS, END_OF_TEXT, IM_END, IMAGE_PAD
from benchmarks.probe.model import Probe
from benchmarks.probe.sizes import MERGE, PATCH, Sizes, as_dict, make_config
from sglang_moelb.demo.models import make_tokenizer

WEIGHTS = "model.safetensors"
FACTS = "probe.json"
FUSED = ("experts.gate_up_proj", "experts.down_proj")
MAX_IMAGE_TOKENS = 2048
_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
_PATCHES = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
# Written by hand because making the processor needs torchvision, and training does not.
PROCESSOR = {
    "processor_class": "Qwen3VLProcessor",
    "image_processor": {
        "image_processor_type": "Qwen2VLImageProcessor",
        # An image of 1 to 2,048 tokens of 32 by 32 pixels keeps its size.
        "size": {"shortest_edge": 32 * 32, "longest_edge": MAX_IMAGE_TOKENS * 32 * 32},
        **_PIXELS,
        **_PATCHES,
    },
    "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor", **_PIXELS, **_PATCHES},
}


def write_tokenizer(folder: Path) -> Path:
    """Write tokenizer, chat template and processor into `folder`, which must exist."""
    make_tokenizer().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
    return folder


def export(probe: Probe, folder: Path, facts: Mapping[str, object]) -> Path:
    """Write `probe` into `folder`, which appears complete or not at all; returns it.

    `facts` of the training are kept beside the weights, for readers.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        _write(probe, Path(scratch), facts)
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for the context manager to remove
    folder.chmod(0o755)
    return folder


def _write(probe: Probe, folder: Path, facts: Mapping[str, object]) -> None:
    tensors = {}
    for name, tensor in probe.state_dict().items():
        tensor = tensor.detach().cpu().to(torch.bfloat16)
        tensors[name] = (tensor.transpose(1, 2) if name.endswith(FUSED) else tensor).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = make_config(probe.sizes)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=IM_END, pad_token_id=END_OF_TEXT).save_pretrained(folder)
    write_tokenizer(folder)
    known = {"sizes": as_dict(probe.sizes), **facts}
    (folder / FACTS).write_text(json.dumps(known, indent=1) + "\n")
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes it for its owner alone


def load(folder: Path) -> Probe:
    """The probe in `folder`, float32, on the host.

    Raises ValueError, naming the file and what to do, for a missing file, truncated or foreign
    weights, and a tokenizer that is not the probe's.
    """
    probe = Probe(read_sizes(folder))
    check_tokenizer(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}); export or copy it again") from error
    wanted = probe.state_dict()
    for name in tensors:
        if name.endswith(FUSED):
            tensors[name] = tensors[name].transpose(1, 2)
    wrong = sorted(wanted.keys() ^ tensors.keys()) + sorted(
        name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than "
            f"{FACTS} says, first {wrong[0]}; export it again"
        )
    probe.load_state_dict(tensors)
    return probe


def read_sizes(folder: Path) -> Sizes:
    """The sizes that the folder's facts name; raises ValueError when it is no probe."""
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(f"{path}: missing; this is not a folder that benchmarks.probe exported")
    sizes = json.loads(path.read_text()).get("sizes", {})
    names = {f.name for f in fields(Sizes)}
    if set(sizes) != names:
        raise ValueError(f"{path}: sizes must be {', '.join(sorted(names))}; export it again")
    return Sizes(**sizes)


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError unless the folder's tokenizer gives the ids that the probe knows."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: missing; copy the probe's tokenizer or export again")
    tokenizer = Tokenizer.from_file(str(path))
    special = {"<|endoftext|>": END_OF_TEXT, "<|im_end|>": IM_END, "<|image_pad|>": IMAGE_PAD}
    ids = {name: tokenizer.token_to_id(name) for name in special}
    text = bytes(range(32, 127)).decode()
    bytewise = tokenizer.encode(text).ids == BYTE_IDS[32:127].tolist()
    if ids != special or not bytewise:
        raise ValueError(
            f"{path}: a wrong tokenizer: the probe's has one token a byte and {special}, this one "
            f"has {ids}; copy the probe's tokenizer or export again"
        )
