"""Several images in one request: comparing two, and asking about one of many."""

from __future__ import annotations

from itertools import product

from benchmarks.probe.item import Part, Split
from benchmarks.probe.tasks.base import Rng, Scene, Task, between, pick
from benchmarks.probe.tasks.canvas import Size
from benchmarks.probe.tasks.shapes import (
    COLOURS,
    SHAPES,
    Thing,
    draw_things,
    key_of,
    place_one,
    scatter,
)

_SMALL = ((4, 5), (5, 4), (5, 5), (4, 6), (6, 4))
_LARGE = tuple(product(range(11, 15), range(11, 15)))
_LONG_SHARE = 0.02
_MAX_DOTS = 6
_MIN_LEAD = 2


def _scene(
    pictures: list[tuple[list[Thing], Size]], question: str, answer: str, *, numbered: bool = False
) -> Scene:
    def render(rng: Rng) -> tuple[Part, ...]:
        parts: list[Part] = []
        for i, (things, size) in enumerate(pictures):
            if numbered:
                parts.append(f"pic {i + 1}:")
            parts.append(draw_things(rng, things, size))
        return (*parts, question)

    keys = " ".join(key_of(things, size) for things, size in pictures)
    return Scene(f"{question} {keys}", answer, render)


def _sample_differ(rng: Rng, split: Split) -> Scene:
    """In what the things of two images differ: shape, colour, both or nothing."""
    size_1, size_2 = pick(rng, _SMALL), pick(rng, _SMALL)
    one, two = place_one(rng, size_1), place_one(rng, size_2)
    answer = pick(rng, ("nothing", "colour", "shape", "both"))
    shape = _same_or_other(rng, one.shape, SHAPES, same=answer in ("nothing", "colour"))
    colour = _same_or_other(rng, one.colour, tuple(COLOURS), same=answer in ("nothing", "shape"))
    two = Thing(shape, colour, two.y, two.x, two.size_px)
    return _scene([([one], size_1), ([two], size_2)], "differ in?", answer)


def _same_or_other(rng: Rng, value: str, options: tuple[str, ...], *, same: bool) -> str:
    return value if same else pick(rng, [option for option in options if option != value])


def _sample_more(rng: Rng, split: Split) -> Scene:
    """Which of two images shows more things, by two or more."""
    few = between(rng, 0, _MAX_DOTS - _MIN_LEAD)
    many = between(rng, few + _MIN_LEAD, _MAX_DOTS)
    answer = between(rng, 1, 2)
    pictures = []
    for num in (many, few) if answer == 1 else (few, many):
        kinds = [(pick(rng, SHAPES), pick(rng, tuple(COLOURS))) for _ in range(num)]
        size = pick(rng, _SMALL)
        pictures.append((scatter(rng, kinds, size), size))
    return _scene(pictures, "which has more?", str(answer))


def _sample_album(rng: Rng, split: Split) -> Scene:
    """Colour or shape of the thing in one of several numbered images; now and then large ones."""
    is_long = rng.random() < _LONG_SHARE
    num_images = between(rng, 5, 9) if is_long else between(rng, 3, 6)
    pictures = []
    for _ in range(num_images):
        size = pick(rng, _LARGE if is_long else _SMALL)
        pictures.append(([place_one(rng, size)], size))
    asked = between(rng, 1, num_images)
    what = pick(rng, ("colour", "shape"))
    thing = pictures[asked - 1][0][0]
    answer = thing.colour if what == "colour" else thing.shape
    return _scene(pictures, f"pic {asked} {what}?", answer, numbered=True)


TASKS = (
    Task(name="differ", modality="vision", sample=_sample_differ),
    Task(name="more", modality="vision", sample=_sample_more),
    Task(name="album", modality="vision", sample=_sample_album),
)
