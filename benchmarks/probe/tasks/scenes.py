"""Coloured shapes in one picture: counting, naming, and which side of one another they are on."""

from __future__ import annotations

from functools import partial

from benchmarks.probe.item import CELL_PX, Part, Split
from benchmarks.probe.tasks.base import Rng, Scene, Task, between, pick
from benchmarks.probe.tasks.canvas import Size, pick_size
from benchmarks.probe.tasks.shapes import (
    COLOURS,
    SHAPES,
    Thing,
    draw_things,
    key_of,
    pick_kinds,
    place_one,
    scatter,
)

_MAX_COUNT = 5
_MAX_OTHERS = 4


def _scene(things: list[Thing], size: Size, question: str, answer: str) -> Scene:
    def render(rng: Rng) -> tuple[Part, ...]:
        return draw_things(rng, things, size), question

    return Scene(f"{question} {key_of(things, size)}", answer, render)


def _sample_count(rng: Rng, split: Split) -> Scene:
    """Things of one colour, of one shape, or all, among others."""
    colours = tuple(COLOURS)
    wanted = pick(rng, ("all", pick(rng, colours), pick(rng, SHAPES)))
    num = between(rng, 1 if wanted == "all" else 0, _MAX_COUNT)
    num_others = 0 if wanted == "all" else between(rng, 0 if num else 1, _MAX_OTHERS)
    other_shapes = [shape for shape in SHAPES if shape != wanted]
    other_colours = [colour for colour in colours if colour != wanted]
    kinds = [
        (
            wanted if wanted in SHAPES else pick(rng, SHAPES),
            wanted if wanted in COLOURS else pick(rng, colours),
        )
        for _ in range(num)
    ]
    kinds += [(pick(rng, other_shapes), pick(rng, other_colours)) for _ in range(num_others)]
    question = f"count {wanted}?"
    size = pick_size(rng, question)
    return _scene(scatter(rng, kinds, size), size, question, str(num))


def _sample_name(rng: Rng, split: Split) -> Scene:
    """Colour and shape of the only thing."""
    size = pick_size(rng, "what?")
    thing = place_one(rng, size)
    return _scene([thing], size, "what?", f"{thing.colour} {thing.shape}")


def _sample_colour(rng: Rng, split: Split) -> Scene:
    """The colour of the only thing with a given shape."""
    kinds = pick_kinds(rng, between(rng, 2, 4))
    question = f"{kinds[0][0]} colour?"
    size = pick_size(rng, question)
    return _scene(scatter(rng, kinds, size), size, question, kinds[0][1])


def _sample_shape(rng: Rng, split: Split) -> Scene:
    """The shape of the only thing with a given colour."""
    kinds = pick_kinds(rng, between(rng, 2, 4))
    question = f"{kinds[0][1]} shape?"
    size = pick_size(rng, question)
    return _scene(scatter(rng, kinds, size), size, question, kinds[0][0])


def _sample_relation(words: tuple[str, str], rng: Rng, split: Split) -> Scene:
    """On which side of another thing one is: at least a cell and a half apart on that axis."""
    kinds = pick_kinds(rng, between(rng, 2, 3))
    question = f"{kinds[0][1]} {words[0]}/{words[1]} of {kinds[1][1]}?"
    size = pick_size(rng, question)
    while True:
        things = scatter(rng, kinds, size)
        one, other = things[0], things[1]
        apart = one.x - other.x if words[0] == "left" else one.y - other.y
        if abs(apart) >= 3 * CELL_PX // 2:
            return _scene(things, size, question, words[0] if apart < 0 else words[1])


TASKS = (
    Task(name="count", modality="vision", sample=_sample_count),
    Task(name="name", modality="vision", sample=_sample_name),
    Task(name="colour", modality="vision", sample=_sample_colour),
    Task(name="shape", modality="vision", sample=_sample_shape),
    Task(name="left_right", modality="vision", sample=partial(_sample_relation, ("left", "right"))),
    Task(
        name="above_below", modality="vision", sample=partial(_sample_relation, ("above", "below"))
    ),
)
