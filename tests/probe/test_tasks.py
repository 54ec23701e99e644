"""The laws of the probe's items: the same again, never shared by splits, as long as promised."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from benchmarks.probe.assets.make_digits import FILE
from benchmarks.probe.item import Item, num_prompt_tokens, num_vision_tokens
from benchmarks.probe.preview import sheet
from benchmarks.probe.tasks import TASKS, make_item
from benchmarks.probe.tasks.base import draw, split_of
from benchmarks.probe.tasks.reading import digit_ids
from benchmarks.probe.tasks.shapes import SHAPES, shape_mask

VISION = [name for name, task in TASKS.items() if task.modality == "vision"]
TEXT = [name for name, task in TASKS.items() if task.modality == "text"]


def content(item: Item) -> tuple[str | bytes, ...]:
    """What the model is given."""
    return tuple(part if isinstance(part, str) else part.tobytes() for part in item.parts)


def keys(task: str, split: str, num: int) -> set[str]:
    rng = np.random.default_rng(11)
    return {draw(TASKS[task], split, rng).key for _ in range(num)}  # type: ignore[arg-type]


def test_the_tasks_cover_what_the_probe_is_for() -> None:
    assert set(VISION) == {
        *("digits", "word", "letters", "number", "count", "name", "colour", "shape"),
        *("left_right", "above_below", "chart_label", "chart_value", "differ", "more", "album"),
    }
    assert set(TEXT) == {"copy", "sort", "sum", "lookup"}


@pytest.mark.parametrize("task", TASKS)
def test_an_item_is_the_same_for_the_same_arguments_only(task: str) -> None:
    item = make_item(task, "test", 5, seed=3)
    again = make_item(task, "test", 5, seed=3)
    assert content(item) == content(again)
    assert item.answer == again.answer
    others = [
        make_item(task, "test", 6, seed=3),
        make_item(task, "test", 5, seed=4),
        make_item(task, "train", 5, seed=3),
    ]
    assert all(content(other) != content(item) for other in others)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_content(task: str) -> None:
    train, test = keys(task, "train", 2000), keys(task, "test", 400)
    assert train.isdisjoint(test)
    if not TASKS[task].has_pools:
        assert {split_of(task, key) for key in train} == {"train"}
        assert {split_of(task, key) for key in test} == {"test"}


@pytest.mark.parametrize("task", TASKS)
def test_no_item_of_one_split_is_an_item_of_the_other(task: str) -> None:
    train = {content(make_item(task, "train", i, seed=i % 3)) for i in range(150)}
    test = {content(make_item(task, "test", i, seed=i % 3)) for i in range(50)}
    assert train.isdisjoint(test)


def test_a_pair_of_numbers_is_added_and_subtracted_in_one_split_only() -> None:
    def pairs(split: str) -> set[tuple[int, ...]]:
        items = [make_item("sum", split, i) for i in range(1500)]  # type: ignore[arg-type]
        texts = [str(item.parts[0]).rstrip("=").replace("+", "-") for item in items]
        return {tuple(sorted(map(int, text.split("-")))) for text in texts}

    train, test = pairs("train"), pairs("test")
    assert train.isdisjoint(test)
    assert len(test) > 200


def test_handwritten_digits_are_in_one_split_only_and_each_split_has_all_ten() -> None:
    assert len(digit_ids("train")) + len(digit_ids("test")) == 1797
    assert set(digit_ids("train")).isdisjoint(digit_ids("test"))
    for split in ("train", "test"):
        drawn = keys("digits", split, 3000)
        ids = {int(i) for key in drawn for i in key.split(",")}
        assert ids <= set(digit_ids(split))
        assert len(ids) > 0.9 * len(digit_ids(split))


def test_the_digits_are_those_of_scikit_learn() -> None:
    theirs = load_digits()
    with np.load(FILE) as ours:
        assert np.array_equal(ours["images"], theirs.images)
        assert np.array_equal(ours["labels"], theirs.target)


def test_the_preview_shows_every_item_with_question_and_answer() -> None:
    items = [make_item(task, "train", 0) for task in TASKS]
    figure = sheet(items)
    titles = [axis.get_title() for axis in figure.axes]
    shown = [bool(axis.images) for axis in figure.axes]
    plt.close(figure)
    for item, title, has_image in zip(items, titles, shown, strict=False):
        assert title.startswith(f"{item.task} · ")
        assert title.endswith(f"→ {item.answer}")
        assert has_image == (TASKS[item.task].modality == "vision")


@pytest.mark.parametrize("task", VISION)
def test_vision_items_have_whole_cells_and_the_promised_share_of_vision(task: str) -> None:
    items = [make_item(task, "train", i) for i in range(150)]
    for item in items:
        for part in item.parts:
            if not isinstance(part, str):
                assert part.dtype == np.uint8
                assert part.shape[2] == 3
                assert part.shape[0] % 32 == part.shape[1] % 32 == 0
        num_tokens = num_prompt_tokens(item.parts)
        assert 20 <= num_tokens <= 2000
        assert 0.5 <= num_vision_tokens(item.parts) / num_tokens <= 0.95


@pytest.mark.parametrize("task", TEXT)
def test_text_items_have_text_only_of_the_promised_length(task: str) -> None:
    for i in range(300):
        item = make_item(task, "train", i)
        assert num_vision_tokens(item.parts) == 0
        assert 20 <= num_prompt_tokens(item.parts) <= 2000


def test_long_prompts_are_there_but_rare() -> None:
    lengths = [num_prompt_tokens(make_item("album", "train", i).parts) for i in range(600)]
    assert 0.003 < np.mean(np.array(lengths) > 700) < 0.05
    assert max(lengths) <= 2000


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_short_and_not_always_the_same(task: str) -> None:
    answers = [make_item(task, "test", i).answer for i in range(200)]
    assert all(1 <= len(answer.encode()) <= 16 for answer in answers)
    most_common = max(answers.count(answer) for answer in set(answers))
    assert most_common <= 0.6 * len(answers)


def test_an_unknown_task_or_split_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'digit': use one of digits, .*lookup"):
        make_item("digit", "test", 0)
    with pytest.raises(ValueError, match="'valid': use one of train, test"):
        make_item("digits", "valid", 0)  # type: ignore[arg-type]


def test_a_prompt_has_the_length_that_the_models_tokenizer_and_processor_give_it() -> None:
    from sglang_moelb.demo.models import CHAT_TEMPLATE, _make_processor, make_tokenizer

    processor = _make_processor(make_tokenizer())
    for task in ("lookup", "name", "chart_value", "album"):
        item = make_item(task, "test", 1)
        content_parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in item.parts
        ]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content_parts}],
            chat_template=CHAT_TEMPLATE,
            add_generation_prompt=True,
        )
        images = [part for part in item.parts if not isinstance(part, str)]
        encoded = processor(text=[text], images=images or None)
        assert len(encoded["input_ids"][0]) == num_prompt_tokens(item.parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_one_piece_within_its_mask(shape: str) -> None:
    for size_px in (16, 24, 64):
        mask = shape_mask(shape, size_px, 8)
        assert mask.shape == (size_px, size_px)
        assert ndimage.label(mask > 64, structure=np.ones((3, 3)))[1] == 1
        assert 0.1 < (mask > 127).mean() < 0.9
