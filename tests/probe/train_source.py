"""Tiny tasks for the tests of the training: a colour, two colours in order, copying letters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TASKS = ("colour", "pair", "copy")
COLOURS = {"r": (220, 30, 30), "g": (30, 200, 30), "b": (30, 30, 220)}


@dataclass(frozen=True, slots=True)
class Question:
    """Parts and the answer."""

    parts: tuple[str | NDArray[np.uint8], ...]
    answer: str


def make_item(task: str, split: str, index: int) -> Question:
    """Deterministic in its arguments."""
    rng = np.random.default_rng((index, split == "test", TASKS.index(task)))
    if task == "copy":
        text = "".join(rng.choice(list("abcd"), size=rng.integers(1, 4)))
        return Question((text,), text)
    names = [str(rng.choice(list(COLOURS))) for _ in range(2 if task == "pair" else 1)]
    images = [_paint(rng, name) for name in names]
    if task == "pair":
        return Question((images[0], "then", images[1], "?"), "".join(names))
    return Question((images[0], "?"), names[0])


def _paint(rng: np.random.Generator, name: str) -> NDArray[np.uint8]:
    height, width = 32 * rng.integers(1, 4, size=2)
    noise = rng.integers(-25, 25, size=(height, width, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
