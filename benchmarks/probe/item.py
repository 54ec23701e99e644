"""One question of the probe, with its exact answer and its length in tokens.

The model's tokenizer has one token per byte; an image is one token per 32 by 32 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]
Modality = Literal["vision", "text"]
Image = NDArray[np.uint8]  # [height, width, 3]
Part = str | Image

CELL_PX = 32
# `<|im_start|>user\n`, `<|im_end|>\n` and `<|im_start|>assistant\n` of the chat template.
NUM_TEMPLATE_TOKENS = 6 + 2 + 11
NUM_IMAGE_MARKS = 2  # `<|vision_start|>` and `<|vision_end|>`


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: `parts` in the order of the prompt, and the exact `answer`.

    Images are RGB, uint8, both sides multiples of 32 pixels.
    """

    task: str
    split: Split
    index: int
    parts: tuple[Part, ...]
    answer: str


def num_vision_tokens(parts: tuple[Part, ...]) -> int:
    """Tokens that stand for pixels in the prompt of `parts`."""
    images = [part for part in parts if not isinstance(part, str)]
    return sum(image.shape[0] * image.shape[1] // CELL_PX**2 for image in images)


def num_prompt_tokens(parts: tuple[Part, ...]) -> int:
    """Tokens of the whole prompt, chat template included, up to the answer."""
    num_bytes = sum(len(part.encode()) for part in parts if isinstance(part, str))
    num_images = sum(not isinstance(part, str) for part in parts)
    marks = NUM_IMAGE_MARKS * num_images
    return NUM_TEMPLATE_TOKENS + num_bytes + marks + num_vision_tokens(parts)
