"""Questions, a small probe and transformers' view of both, for the tests of the training."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.probe.device import Batch, upload
from benchmarks.probe.encode import encode
from benchmarks.probe.export import write_tokenizer
from benchmarks.probe.model import Probe, draw
from benchmarks.probe.pack import pack, slot_bytes, write
from benchmarks.probe.sizes import PRESETS, Sizes, make_config

torch.set_num_threads(1)  # many small products: threads only get into each other's way
TINY = PRESETS["tiny"]


class Question:
    def __init__(self, *parts: str | np.ndarray, answer: str = "yes") -> None:
        self.parts = parts
        self.answer = answer


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


QUESTIONS = (
    Question("how many?", image(64, 96), answer="7"),
    Question("abc", answer="cba"),
    Question(image(32, 160, 1), "or", image(128, 64, 2), image(32, 32, 3), "é?", answer="left"),
)


def batch_of(*questions: Question) -> Batch:
    arrays = pack([encode(question) for question in questions], range(len(questions)))
    block = np.zeros(slot_bytes(len(arrays["ids_T"]), 0), dtype=np.uint8)
    return upload(write(arrays, block), block, torch.device("cpu"), "padded")


def probe_of(sizes: Sizes = TINY) -> Probe:
    probe = Probe(sizes)
    draw(probe, torch.Generator().manual_seed(1))
    for name, parameter in probe.named_parameters():  # biases and norms that show when forgotten
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=_seeded(name)))
    return probe


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def theirs_of(probe: Probe) -> transformers.PreTrainedModel:
    theirs = transformers.Qwen3VLMoeForConditionalGeneration(make_config(probe.sizes)).eval()
    theirs.load_state_dict(probe.state_dict())
    return theirs


def their_inputs(*questions: Question) -> dict[str, torch.Tensor]:
    processor = transformers.AutoProcessor.from_pretrained(
        write_tokenizer(Path(tempfile.mkdtemp()))
    )
    texts, images = [], []
    for question in questions:
        content = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
            for p in question.parts
        ]
        chat = [{"role": "user", "content": content}]
        texts.append(
            processor.apply_chat_template(chat, add_generation_prompt=True)
            + question.answer
            + "<|im_end|>"
        )
        images += [part for part in question.parts if not isinstance(part, str)]
    return dict(
        processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )
