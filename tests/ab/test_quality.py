from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ab.fake_server import answer_of
from ab.support import fake_command, make_plan
from sglang_moelb.ab.cli import execute
from sglang_moelb.ab.quality import accuracy, compare_accuracy, grade, is_right
from sglang_moelb.ab.result import Accuracy, PairedAccuracy
from sglang_moelb.ab.score import mcnemar, paired_difference, wilson
from sglang_moelb.ab.types import Outcome, Request

GROUPS = ("even", "odd")
NUM = 10
MAX_TOKENS = 7  # the seventh token of the fake server has a text of its own


def request(
    request_id: int, answer: str | None = "yes", group: str = "", images: int = 0
) -> Request:
    return Request(
        request_id=request_id,
        messages=({"role": "user", "content": "?"},),
        num_images=images,
        num_chars=1,
        answer=answer,
        group=group,
    )


def outcome(request_id: int, text: str = "yes", round_: int = 0, error: str = "") -> Outcome:
    return Outcome(
        request_id=request_id, kind="text", round=round_, start_s=0.0, text=text, error=error
    )


def rows(found: list[Any]) -> dict[str, Any]:
    return {row.name: row for row in found}


def all_of(found: list[Accuracy] | list[PairedAccuracy]) -> Any:
    return rows(found)["all"]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [("42", "42", True), (" 42\n", "42", True), ("421", "42", False), ("", "42", False)],
)
def test_right_is_equal_but_for_white_space_around(text: str, answer: str, expected: bool) -> None:
    assert is_right(text, answer) == expected


def test_only_requests_with_an_answer_count_and_failures_do_not() -> None:
    requests = [request(0), request(1, answer=None), request(2), request(3)]
    outcomes = [outcome(0), outcome(1), outcome(2, "no"), outcome(3, error="gone")]
    row = all_of(accuracy(grade(requests, outcomes)))
    assert (row.num_requests, row.num_answers, row.num_right) == (2, 2, 1)
    assert row.accuracy.value == 0.5
    assert row.accuracy.interval == wilson(1, 2)
    assert accuracy(grade([request(1, answer=None)], outcomes)) == []


def test_there_are_rows_for_all_for_each_kind_and_for_each_group() -> None:
    requests = [request(0, group="b", images=1), request(1, group="a"), request(2)]
    found = rows(accuracy(grade(requests, [outcome(0), outcome(1, "no"), outcome(2)])))
    assert list(found) == ["all", "image", "text", "a", "b"]
    assert [row.num_requests for row in found.values()] == [3, 1, 2, 1, 1]
    assert (found["a"].accuracy.value, found["b"].accuracy.value) == (0.0, 1.0)


def test_rounds_of_a_request_are_one_item_of_the_interval() -> None:
    requests = [request(i) for i in range(4)]
    outcomes = [outcome(i, round_=r) for i in range(4) for r in range(3)]
    outcomes[0] = outcome(0, "no", 0)
    row = all_of(accuracy(grade(requests, outcomes)))
    assert (row.num_requests, row.num_answers, row.num_right) == (4, 12, 11)
    assert row.accuracy.value == pytest.approx(11 / 12)
    assert row.accuracy.interval == pytest.approx(wilson(4 * 11 / 12, 4))


def test_one_round_is_mcnemars_test_over_the_answers() -> None:
    requests = [request(i) for i in range(20)]
    base = grade(requests, [outcome(i, "no" if i >= 17 else "yes") for i in range(20)])
    other = grade(requests, [outcome(i, "no" if i < 8 else "yes") for i in range(20)])
    row = all_of(compare_accuracy(base, other))
    assert (row.num_requests, row.num_lost, row.num_won) == (20, 8, 3)
    assert row.difference.value == pytest.approx(-0.25)
    assert row.difference.interval == pytest.approx(paired_difference(8, 3, 20)[1])
    assert row.p_value == pytest.approx(mcnemar(8, 3))
    assert 0.25 < row.smallest_difference < 0.6


def test_a_request_lost_in_one_round_of_two_is_half_a_loss_and_one_discordant_item() -> None:
    requests = [request(i) for i in range(10)]
    right = [outcome(i, round_=r) for i in range(10) for r in range(2)]
    base = grade(requests, right)
    other = grade(requests, [outcome(0, "no", 0), *right[1:]])
    row = all_of(compare_accuracy(base, other))
    assert (row.num_lost, row.num_won) == (1, 0)
    assert row.difference.value == pytest.approx(-0.05)
    assert row.p_value == 1.0


def test_answers_are_paired_in_the_same_round_and_only_where_both_arms_gave_one() -> None:
    requests = [request(0), request(1)]
    base = grade(requests, [outcome(0), outcome(1, error="gone"), outcome(0, "no", 1)])
    other = grade(requests, [outcome(0, "no"), outcome(1), outcome(0, "yes", 1)])
    row = all_of(compare_accuracy(base, other))
    assert row.num_requests == 1
    assert (row.num_lost, row.num_won, row.difference.value) == (0, 0, 0.0)
    assert compare_accuracy(base, grade(requests, [])) == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a comparison in which the first arm is always right."""
    out = tmp_path_factory.mktemp("quality")
    plan = make_plan(out, "stock=", "auto=--plugin --flip-every 2", num_requests=NUM)
    known = [
        dataclasses.replace(r, answer=_text(r), group=GROUPS[r.request_id % 2])
        for r in plan.requests[:-2]
    ]
    requests = (*known, *plan.requests[-2:])
    plan = dataclasses.replace(plan, requests=requests, max_tokens=MAX_TOKENS)
    console = Console(width=160, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang_moelb.ab.run.server_command", fake_command)
        assert execute(plan, console)
    return out, console.export_text()


def _text(asked: Request) -> str:
    body = {"messages": list(asked.messages), "max_tokens": MAX_TOKENS}
    tokens = answer_of(body, argparse.Namespace(flip_every=0, shift=0.0))
    return "".join(text for _, text, _ in tokens)


def test_a_lossy_arm_loses_what_it_answers_otherwise(report: tuple[Path, str]) -> None:
    result = json.loads((report[0] / "result.json").read_text())
    stock, auto = result["arms"]
    assert result["conditions"]["num_answers"] == NUM - 2
    first = rows_of(stock["accuracy"])
    assert first["all"]["accuracy"]["value"] == 1.0
    assert (first["all"]["num_requests"], first["all"]["num_answers"]) == (NUM - 2, 2 * (NUM - 2))
    assert {"even", "odd"} < set(first)
    assert stock["paired_accuracy"] == []
    second, pair = rows_of(auto["accuracy"])["all"], rows_of(auto["paired_accuracy"])["all"]
    num_wrong = second["num_requests"] - second["num_right"] // 2
    assert 0 < num_wrong < NUM - 2
    assert (pair["num_lost"], pair["num_won"]) == (num_wrong, 0)
    assert pair["difference"]["value"] == pytest.approx(-num_wrong / (NUM - 2))
    assert pair["p_value"] == pytest.approx(min(1.0, 2 / 2**num_wrong))
    for name in GROUPS:
        assert rows_of(auto["paired_accuracy"])[name]["num_requests"] == (NUM - 2) // 2


def test_page_and_terminal_show_the_same_accuracy(report: tuple[Path, str]) -> None:
    out, terminal = report
    result = json.loads((out / "result.json").read_text())
    pair = rows_of(result["arms"][1]["paired_accuracy"])["all"]
    html = (out / "report.html").read_text()
    difference = f"{pair['difference']['value'] * 100:+.2f}"
    assert '<h2 id="quality">' in html
    assert "no quality to lose" not in html
    assert difference in html
    assert difference in terminal
    assert f"{pair['num_lost']}, 0 of {NUM - 2}" in terminal
    for name in ("all", *GROUPS):
        assert f"<td>{name}</td>" in html
        assert name in terminal
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def rows_of(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found}
