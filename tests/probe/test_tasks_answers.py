"""Answers worked out again from what was asked and shown, apart from how they were made."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.probe.item import Item
from benchmarks.probe.tasks import TASKS, make_item
from benchmarks.probe.tasks.base import Scene, draw
from benchmarks.probe.tasks.reading import _DIGITS_FILE
from benchmarks.probe.tasks.shapes import COLOURS

NUM = 150


class Shown(NamedTuple):
    """A thing as a key names it."""

    shape: str
    colour: str
    y: int
    x: int


def scenes(task: str) -> list[Scene]:
    rng = np.random.default_rng(2)
    return [draw(TASKS[task], "test", rng) for _ in range(NUM)]


def things(picture: str) -> list[Shown]:
    """The things of a picture's name, `6x7:star,red,40,30,22;ring,...`."""
    fields = [entry.split(",") for entry in picture.split(":")[1].split(";") if entry]
    return [Shown(f[0], f[1], int(f[2]), int(f[3])) for f in fields]


def asked(scene: Scene) -> tuple[str, list[list[Shown]]]:
    """The question and the pictures of a key."""
    match = re.fullmatch(r"(.*?\?) (.*)", scene.key)
    assert match
    return match[1], [things(picture) for picture in match[2].split(" ")]


def test_digits_say_what_the_images_are_labelled() -> None:
    labels = np.load(_DIGITS_FILE)["labels"]
    for scene in scenes("digits"):
        assert scene.answer == "".join(str(labels[int(i)]) for i in scene.key.split(","))


@pytest.mark.parametrize(
    ("task", "pattern"),
    [("word", r"[a-z]{3,6}"), ("letters", r"[A-Z]{2,4}"), ("number", r"[1-9]\d{1,4}")],
)
def test_what_is_read_is_what_is_written(task: str, pattern: str) -> None:
    for i, scene in enumerate(scenes(task)):
        assert scene.answer == scene.key
        assert re.fullmatch(pattern, scene.answer)
        item = make_item(task, "test", i)
        assert _num_written(item) >= len(item.answer)


def _num_written(item: Item) -> int:
    """Columns of 32 pixels in which anything differs much from the background."""
    image = item.parts[0]
    assert not isinstance(image, str)
    grey = image.astype(int).sum(axis=2)
    off = np.abs(grey - np.median(grey)) > 150
    return int(off.reshape(image.shape[0], -1, 32).any(axis=(0, 2)).sum())


def test_count_is_the_number_of_things_asked_for() -> None:
    for scene in scenes("count"):
        question, [shown] = asked(scene)
        wanted = question.removeprefix("count ").removesuffix("?")
        assert int(scene.answer) == sum(
            wanted in ("all", thing.shape, thing.colour) for thing in shown
        )


def test_as_many_things_are_drawn_as_are_counted() -> None:
    num_checked = 0
    for i in range(4 * NUM):
        item = make_item("count", "train", i)
        if item.parts[1] == "count all?":
            assert ndimage.label(_coloured(item), structure=np.ones((3, 3)))[1] == int(item.answer)
            num_checked += 1
    assert num_checked > NUM // 2


def _coloured(item: Item) -> NDArray[np.bool_]:
    """Where the only image is far from grey."""
    image = item.parts[0]
    assert not isinstance(image, str)
    return np.asarray(image.max(axis=2).astype(int) - image.min(axis=2) > 75)


def test_name_is_shape_and_colour_of_the_only_thing_and_the_colour_is_seen() -> None:
    for i, scene in enumerate(scenes("name")):
        _, [[thing]] = asked(scene)
        assert scene.answer == f"{thing.colour} {thing.shape}"
        item = make_item("name", "test", i)
        image = item.parts[0]
        assert not isinstance(image, str)
        seen = np.median(image[_coloured(item)], axis=0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(COLOURS[name] - seen).sum()))
        assert nearest == item.answer.split()[0]


@pytest.mark.parametrize("task", ["colour", "shape"])
def test_the_thing_asked_for_is_there_once_and_has_the_answer(task: str) -> None:
    for scene in scenes(task):
        question, [shown] = asked(scene)
        given = question.split()[0]
        [found] = [thing for thing in shown if given in (thing.shape, thing.colour)]
        assert scene.answer == (found.colour if task == "colour" else found.shape)


@pytest.mark.parametrize("task", ["left_right", "above_below"])
def test_the_side_is_that_of_the_centres_clearly_apart(task: str) -> None:
    low, high = task.split("_")
    answers = set()
    for scene in scenes(task):
        question, [shown] = asked(scene)
        one, other = re.fullmatch(rf"(\w+) {low}/{high} of (\w+)\?", question).groups()  # type: ignore[union-attr]
        by_colour = {thing.colour: thing for thing in shown}
        a, b = by_colour[one], by_colour[other]
        apart = a.x - b.x if low == "left" else a.y - b.y
        assert abs(apart) >= 32
        assert scene.answer == (low if apart < 0 else high)
        answers.add(scene.answer)
    assert answers == {low, high}


@pytest.mark.parametrize("task", ["chart_label", "chart_value"])
def test_the_tallest_bar_is_alone_and_the_answer_is_its_own(task: str) -> None:
    for scene in scenes(task):
        labels = re.findall(r"'([A-Z])'", scene.key)
        values = [int(value) for value in re.findall(r"\d+", scene.key)]
        assert len(labels) == len(values) == len(set(labels))
        tallest = max(values)
        assert sorted(values)[-2] <= tallest - 6
        expected = labels[values.index(tallest)] if task == "chart_label" else str(tallest)
        assert scene.answer == expected


def test_differ_names_what_is_not_the_same() -> None:
    answers = set()
    for scene in scenes("differ"):
        _, [[one], [two]] = asked(scene)
        differ = (one.colour != two.colour, one.shape != two.shape)
        names = {(0, 0): "nothing", (1, 0): "colour", (0, 1): "shape", (1, 1): "both"}
        assert scene.answer == names[differ]
        answers.add(scene.answer)
    assert len(answers) == 4


def test_more_names_the_image_with_more_things() -> None:
    for scene in scenes("more"):
        _, [one, two] = asked(scene)
        assert abs(len(one) - len(two)) >= 2
        assert scene.answer == ("1" if len(one) > len(two) else "2")


def test_album_tells_of_the_image_with_the_number_asked_for() -> None:
    for scene in scenes("album"):
        question, pictures = asked(scene)
        _, number, what = question.removesuffix("?").split()
        [thing] = pictures[int(number) - 1]
        assert scene.answer == (thing.colour if what == "colour" else thing.shape)


def test_an_album_numbers_its_images_in_order() -> None:
    item = make_item("album", "test", 0)
    num_images = sum(not isinstance(part, str) for part in item.parts)
    assert [p for p in item.parts if isinstance(p, str)][:-1] == [
        f"pic {i + 1}:" for i in range(num_images)
    ]
    assert [isinstance(part, str) for part in item.parts[:-1]] == [True, False] * num_images


def text_of(item: Item) -> str:
    [text] = item.parts
    assert isinstance(text, str)
    return text


def test_copy_repeats_and_sort_orders() -> None:
    for i in range(NUM):
        item = make_item("copy", "test", i)
        assert text_of(item) == f"copy {item.answer}:"
        item = make_item("sort", "test", i)
        chars = text_of(item).removeprefix("sort ").removesuffix(":")
        assert item.answer == "".join(sorted(set(chars)))


def test_sums_and_differences_are_right() -> None:
    signs = set()
    for i in range(NUM):
        item = make_item("sum", "test", i)
        one, sign, two = re.fullmatch(r"(\d+)([+-])(\d+)=", text_of(item)).groups()  # type: ignore[union-attr]
        assert int(item.answer) == int(one) + (int(two) if sign == "+" else -int(two))
        assert int(item.answer) >= 0
        signs.add(sign)
    assert signs == {"+", "-"}


def test_lookup_gives_the_value_listed_for_the_key() -> None:
    for i in range(NUM):
        item = make_item("lookup", "test", i)
        listed, question = text_of(item).split(";")
        pairs = [(entry[0], entry[1:]) for entry in listed.split(",")]
        assert len(dict(pairs)) == len(pairs)
        assert item.answer == dict(pairs)[question.removesuffix("?")]
