"""Stock SGLang on the stand-in computes what transformers computes on the same weights.

Greedy tokens are equal, and log-probabilities of prompt and output agree within `TOLERANCE`, in
float32. No balancer is installed in these servers: they are the ground on which every comparison
with the balancer stands.
"""

from __future__ import annotations

import base64
import io
import json
import os
import textwrap
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from sglang_moelb.demo.models import Kind, write_model
from sglang_moelb.ep.standin.hooks import SITE
from sglang_moelb.ep.standin.launch import A2A

from .conftest import Serve, Server

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-5  # float32: sums in another order, over 4 layers and a vocabulary of 264
NUM_NEW_TOKENS = 16
REQUEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text, with one `<|image_pad|>` for each image; images by name of `make_image`."""

    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens, their log-probabilities, and those of the prompt's tokens after the first;
    the reference has None for a token of an image, which has no probability."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float | None]


def _asked(text: str, *images: str) -> Prompt:
    """As the chat template writes it."""
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    return Prompt(f"<|im_start|>user\n{marks}{text}<|im_end|>\n<|im_start|>assistant\n", images)


SEA = "Tell me about the sea, as an old sailor who has seen many storms would. "
TEXT_PROMPTS = (
    Prompt("A"),
    Prompt("Hello world"),
    _asked("What is 1234 + 5678?"),
    Prompt(SEA),
    Prompt(SEA * 5),
    Prompt(SEA * 16),  # longer than a chunk of prefill
)
IMAGE_PROMPTS = (
    _asked("What is this?", "gradient"),
    _asked("", "noise"),
    _asked("Describe the picture. " * 12, "blocks"),
    _asked("Which of the two is brighter?", "gradient", "tiny"),
    _asked("No picture here."),
)


@cache
def make_image(name: str) -> Image.Image:
    """A small RGB picture of a size of its own."""
    random = np.random.default_rng(3)
    x, y = np.meshgrid(np.linspace(0, 255, 320), np.linspace(0, 255, 240))
    pixels = {
        "gradient": np.stack([x, y, 255 - x], axis=-1),
        "noise": random.integers(0, 256, (300, 500, 3)),
        "blocks": np.kron(random.integers(0, 256, (6, 8, 3)), np.ones((64, 64, 1))),
        "tiny": np.full((32, 48, 3), 200),
    }[name]
    return Image.fromarray(pixels.astype(np.uint8))


def ask(server: Server, prompt: Prompt) -> Answer:
    """One greedy request to `/generate`."""
    body: dict[str, Any] = {
        "text": prompt.text,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": NUM_NEW_TOKENS,
            "ignore_eos": True,
        },
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    if prompt.images:
        body["image_data"] = [_data_url(make_image(name)) for name in prompt.images]
    request = urllib.request.Request(
        f"{server.url}/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        meta = json.load(response)["meta_info"]
    output = meta["output_token_logprobs"]
    return Answer(
        tokens=[token for _, token, _ in output],
        logprobs=[logprob for logprob, _, _ in output],
        prompt_logprobs=[logprob for logprob, *_ in meta["input_token_logprobs"][1:]],
    )


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Reference:
    """The same checkpoint in transformers, float32, on the host."""

    def __init__(self, folder: Path, *, vision: bool) -> None:
        self._processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(folder)
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        self._model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        self._image_token = getattr(self._model.config, "image_token_id", None)
        # An idle server keeps its cores busy, and threads that wait for one another then crawl.
        torch.set_num_threads(1)

    @torch.no_grad()
    def ask(self, prompt: Prompt) -> Answer:
        """Greedy generation, then one forward over prompt and output for the log-probabilities."""
        images = {"images": [make_image(name) for name in prompt.images]} if prompt.images else {}
        inputs = self._processor(text=[prompt.text], **images, return_tensors="pt")
        num_prompt = inputs["input_ids"].shape[1]
        ids = self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
        )
        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in inputs:
            padding = (0, ids.shape[1] - num_prompt)
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(
                inputs["mm_token_type_ids"], padding
            )
        logprobs = self._model(**inputs).logits[0, :-1].float().log_softmax(dim=-1)
        tokens = ids[0, 1:]
        taken = logprobs[torch.arange(tokens.numel()), tokens].tolist()
        prompt_tokens = tokens[: num_prompt - 1].tolist()
        return Answer(
            tokens=tokens[num_prompt - 1 :].tolist(),
            logprobs=taken[num_prompt - 1 :],
            prompt_logprobs=[
                None if token == self._image_token else logprob
                for logprob, token in zip(taken, prompt_tokens, strict=False)
            ],
        )


def max_distance(answer: Answer, reference: Answer) -> float:
    """Largest difference of log-probabilities; infinite where tokens differ."""
    if answer.tokens != reference.tokens:
        return float("inf")
    pairs = [
        *zip(answer.logprobs, reference.logprobs, strict=True),
        *zip(answer.prompt_logprobs, reference.prompt_logprobs, strict=True),
    ]
    return max(abs(a - b) for a, b in pairs if b is not None)


def ask_together(server: Server, prompts: tuple[Prompt, ...]) -> list[Answer]:
    """All prompts at once, so that batches are mixed and both ranks have work."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt), prompts))


PROMPTS: dict[Kind, tuple[Prompt, ...]] = {
    "text": TEXT_PROMPTS,
    "vl": IMAGE_PROMPTS + TEXT_PROMPTS,
    "deepseek": TEXT_PROMPTS,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], list[Answer]]:
    """What transformers answers to the prompts of a kind of model."""

    @cache
    def of(kind: Kind) -> list[Answer]:
        folder = write_model(kind, tmp_path_factory.mktemp("reference") / kind)
        reference = Reference(folder, vision=kind == "vl")
        return [reference.ask(prompt) for prompt in PROMPTS[kind]]

    return of


@pytest.mark.parametrize(
    ("kind", "a2a", "attention_dp"),
    [
        ("text", "deepep", False),
        pytest.param("text", "none", False, marks=pytest.mark.slow),
        pytest.param("deepseek", "deepep", False, marks=pytest.mark.slow),
        ("vl", "deepep", True),
    ],
    ids=["text-tp", "text-without-a2a", "deepseek-tp", "vl-dp"],
)
def test_stock_agrees_with_transformers_alone_and_in_batches(
    serve: Serve,
    expected: Callable[[Kind], list[Answer]],
    kind: Kind,
    a2a: A2A,
    attention_dp: bool,
) -> None:
    prompts, references = PROMPTS[kind], expected(kind)
    server = serve(kind, "--disable-radix-cache", a2a=a2a, attention_dp=attention_dp)
    # One request at a time: with attention DP the other rank has no tokens at all.
    alone = [ask(server, prompt) for prompt in prompts]
    together = ask_together(server, prompts)
    for answers in (alone, together):
        distances = [max_distance(*pair) for pair in zip(answers, references, strict=True)]
        assert max(distances) <= TOLERANCE, distances
    assert len({token for answer in alone for token in answer.tokens}) > 20, "output is not varied"


@pytest.mark.slow
def test_losing_one_ranks_rows_in_combine_is_caught(
    serve: Serve, expected: Callable[[Kind], list[Answer]], tmp_path: Path
) -> None:
    """The check above would notice, and the stand-in's Buffer is what the server runs."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            from sglang_moelb.ep.standin.deep_ep_buffer import Buffer

            combine = Buffer.combine

            def lossy(self, x, *args, **kwargs):
                return combine(self, x * (self.rank != 1), *args, **kwargs)

            Buffer.combine = lossy
            """
        )
    )
    path = [str(SITE), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    server = serve("text", env={"PYTHONPATH": os.pathsep.join(path)})
    assert max_distance(ask(server, TEXT_PROMPTS[3]), expected("text")[3]) > 0.1
