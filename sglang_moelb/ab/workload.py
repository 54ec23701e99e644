"""The requests that every arm gets: the demo mix, made from a seed, or a file of the user's."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image

from sglang_moelb.ab.images import fit, png_uri, real_images
from sglang_moelb.ab.prompts import (
    IMAGE_QUESTIONS,
    MULTI_IMAGE_QUESTIONS,
    PASSAGE_TASKS,
    PASSAGES,
    TEXT_QUESTIONS,
)
from sglang_moelb.ab.types import AbError, Message, Request

DEFAULT_SIDE_PX = 448
SIZE_SHARES = (0.375, 0.625, 0.875, 1.0)
# Of every ten requests: one image, several images, a short question, a text to work on. Vision
# tokens are then most of the prompt tokens, as in the use of such models.
PATTERN = ("image",) * 5 + ("images",) * 3 + ("question",) * 1 + ("passage",) * 1


def demo_workload(
    num_requests: int, *, seed: int, image_side_px: int = DEFAULT_SIDE_PX
) -> tuple[Request, ...]:
    """A mix of image and text requests, equal for equal arguments on any machine.

    `image_side_px` is the longer side of the largest images; the others are fractions of it.
    Raises `AbError` for a count below 1 or a side below 32 px.
    """
    if num_requests < 1:
        raise AbError(f"--num-requests {num_requests}: must be at least 1.")
    if image_side_px < 32:
        raise AbError(f"--image-side {image_side_px}: must be at least 32 px.")
    rng = random.Random(seed)
    shapes = [PATTERN[i % len(PATTERN)] for i in range(num_requests)]
    rng.shuffle(shapes)
    return tuple(_make(i, shape, rng, image_side_px) for i, shape in enumerate(shapes))


def warmup_of(requests: Sequence[Request], num_warmup: int) -> tuple[Request, ...]:
    """Up to `num_warmup` requests spread over the workload; with two or more, of each kind."""
    by_kind = sorted(requests, key=lambda request: request.kind)
    count = min(num_warmup, len(by_kind))
    step = (len(by_kind) - 1) / max(1, count - 1)
    return tuple(by_kind[round(i * step)] for i in range(count))


def _make(request_id: int, shape: str, rng: random.Random, side_px: int) -> Request:
    if shape == "question":
        return _text(request_id, rng.choice(TEXT_QUESTIONS))
    if shape == "passage":
        return _text(request_id, f"{rng.choice(PASSAGE_TASKS)}\n\n{rng.choice(PASSAGES)}")
    count = 1 if shape == "image" else rng.choice((2, 3))
    questions = IMAGE_QUESTIONS if count == 1 else MULTI_IMAGE_QUESTIONS
    names = rng.sample(sorted(real_images()), count)
    sides = [max(32, round(side_px * rng.choice(SIZE_SHARES))) for _ in names]
    pictures = [fit(real_images()[name], side) for name, side in zip(names, sides, strict=True)]
    return _with_images(request_id, rng.choice(questions), pictures)


def _text(request_id: int, text: str) -> Request:
    message: Message = {"role": "user", "content": text}
    return Request(request_id=request_id, messages=(message,), num_images=0, num_chars=len(text))


def _with_images(request_id: int, question: str, pictures: list[Image.Image]) -> Request:
    parts = [{"type": "image_url", "image_url": {"url": png_uri(picture)}} for picture in pictures]
    message: Message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return Request(
        request_id=request_id,
        messages=(message,),
        num_images=len(pictures),
        num_chars=len(question),
        num_pixels=sum(picture.width * picture.height for picture in pictures),
    )
