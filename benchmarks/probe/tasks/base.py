"""What a task is, and how training and test contents are kept apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from benchmarks.probe.item import Modality, Part, Split

Rng = np.random.Generator
T = TypeVar("T")

NUM_PORTIONS = 8  # one portion of the contents is for tests


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an item before it is drawn.

    `key` names all that decides the answer, places in pixels included: two items with the same
    key ask the same question about the same thing. `render` draws what is left to chance, the
    background first of all.
    """

    key: str
    answer: str
    render: Callable[[Rng], tuple[Part, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of question. `sample` draws a content.

    `has_pools`: `sample` itself draws from different material for each split, so that contents
    need not be told apart by their key.
    """

    name: str
    modality: Modality
    sample: Callable[[Rng, Split], Scene]
    has_pools: bool = False


def split_of(task: str, key: str) -> Split:
    """The split that a content belongs to, by a hash of it: one in eight is for tests."""
    return "test" if zlib.crc32(f"{task}|{key}".encode()) % NUM_PORTIONS == 0 else "train"


def draw(task: Task, split: Split, rng: Rng) -> Scene:
    """A content of `split`: drawn again until it belongs there."""
    while True:
        scene = task.sample(rng, split)
        if task.has_pools or split_of(task.name, scene.key) == split:
            return scene


def pick(rng: Rng, options: Sequence[T]) -> T:
    """One of `options`, all alike in chance."""
    return options[int(rng.integers(len(options)))]


def pick_distinct(rng: Rng, options: Sequence[T], num: int) -> list[T]:
    """`num` different ones of `options`, in random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:num]]


def between(rng: Rng, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return int(rng.integers(low, high + 1))
