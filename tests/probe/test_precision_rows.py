"""Rows of what low precision costs: by group, against the lever off, and the claim beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.probe.compare import compare
from benchmarks.probe.encode import IM_END, text_ids
from benchmarks.probe.force import IMAGE_MARKS, body_of
from benchmarks.probe.force import graded as forced
from benchmarks.probe.item import Item
from benchmarks.probe.precision import low_share
from benchmarks.probe.precision_rows import rows_of, table
from benchmarks.probe.result import Evaluation, Graded, accuracies
from benchmarks.probe.suite import ProbeError

TASK = {"vision": "count", "text": "sort"}


def graded(index: int, modality: Any, text: str = "right", logprob: float = -0.1) -> Graded:
    return Graded(
        task=TASK[modality],
        modality=modality,
        index=index,
        digest=index,
        answer="right",
        text=text,
        is_correct=text == "right",
        num_prompt_tokens=100,
        latency_ms=1.0,
        token_ids=(1,) if text == "right" else (2,),
        token_texts=(text,),
        logprobs=(logprob,),
    )


def evaluation(items: list[Graded], reference: list[Graded] | None = None) -> Evaluation:
    return Evaluation(
        url="", model="probe", seed=0, num_items=len(items), tasks=("count", "sort"), wall_s=1.0,
        is_partial=False, failure="", average=None, accuracy=accuracies(items),
        comparison=compare(items, reference) if reference else (), items=tuple(items),
    )  # fmt: skip


OFF = [graded(i, "vision") for i in range(40)] + [graded(i, "text") for i in range(20)]


def test_the_first_run_has_no_comparison_and_every_group_its_accuracy() -> None:
    rows = list(rows_of(evaluation(OFF)))
    assert [row["group"] for row in rows] == ["all", "vision", "text"]
    assert [row["num_items"] for row in rows] == [60, 40, 20]
    assert all("difference" not in row for row in rows)


def test_text_is_counted_apart_from_the_images_of_its_batches() -> None:
    low = [graded(i, "vision", "wrong" if i < 4 else "right", -0.3) for i in range(40)]
    rows = {row["group"]: row for row in rows_of(evaluation(low + OFF[40:], OFF))}
    assert rows["text"]["difference"] == 0.0
    assert rows["text"]["distance"] == 0.0
    assert rows["vision"]["difference"] == pytest.approx(-0.1)
    assert (rows["vision"]["num_lost"], rows["vision"]["num_won"]) == (4, 0)
    assert rows["vision"]["distance"] == pytest.approx(0.2)
    assert rows["vision"]["distance_interval"][0] <= rows["vision"]["distance"]


@pytest.mark.parametrize(
    ("num_items", "num_wrong", "holds"),
    [(300, 0, "within"), (60, 0, "not within"), (300, 8, "not within")],
)
def test_the_claim_is_judged_by_the_interval_and_not_by_the_noise_of_two_runs_off(
    num_items: int, num_wrong: int, holds: str
) -> None:
    off = [graded(i, "vision") for i in range(num_items)]
    low = [graded(i, "vision", "wrong" if i < num_wrong else "right") for i in range(num_items)]
    told = {"format": "fp8", "way": "served", "low_share": 0.5}
    rows = [told | {"setting": "off"} | row for row in rows_of(evaluation(off))]
    rows += [told | {"setting": "off again"} | row for row in rows_of(evaluation(off, off))]
    assert "The furthest" not in table(rows)
    rows += [told | {"setting": "always"} | row for row in rows_of(evaluation(low, off))]
    assert f"under fp8 served, always: {holds} ReaLB's 1 point" in table(rows)


def test_rows_low_are_a_share_of_the_prompts_rows_in_all_layers() -> None:
    before, after = (
        {"totals": {"num_low_rows": n}, "topology": {"topk": 4, "num_layers": 2}}
        for n in (1000, 1000 + 60 * 100 * 4 * 2 // 4)
    )
    assert low_share(before, after, evaluation(OFF)) == pytest.approx(0.25)


ITEM = Item(
    task="count", split="test", index=3,
    parts=(np.zeros((32, 64, 3), np.uint8), "How many?"), answer="12",
)  # fmt: skip
RIGHT = (*text_ids("12").tolist(), IM_END)


def told_by_a_server(likeliest: tuple[int, ...]) -> dict[str, Any]:
    places = [(-0.5 * n, token, None) for n, token in enumerate(RIGHT)]
    return {
        "input_token_logprobs": [(None, 7, None), *places],
        "input_top_logprobs": [None, *([(0.0, token, None)] for token in likeliest)],
    }


def test_a_forced_answer_is_right_where_every_place_of_it_is_the_likeliest() -> None:
    right = forced(ITEM, told_by_a_server(RIGHT), 1.0)
    assert right.is_correct
    assert right.logprobs == (0.0, -0.5, -1.0)
    assert right.token_ids == RIGHT
    wrong = forced(ITEM, told_by_a_server((RIGHT[0], 5, RIGHT[2])), 1.0)
    assert not wrong.is_correct
    assert wrong.logprobs == right.logprobs, "of the right tokens, not of the likeliest"


def test_a_prompt_that_was_read_otherwise_is_an_error() -> None:
    told = told_by_a_server(RIGHT)
    told["input_token_logprobs"][-1] = (-1.0, 9, None)
    with pytest.raises(ProbeError, match="item 3 of count"):
        forced(ITEM, told, 1.0)


def test_the_forced_prompt_is_the_chat_templates_with_the_answer_closed() -> None:
    body = body_of(ITEM)
    assert body["text"] == (
        f"<|im_start|>user\n{IMAGE_MARKS}How many?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>"
    )
    assert [url[:22] for url in body["image_data"]] == ["data:image/png;base64,"]
