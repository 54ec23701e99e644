"""The probe's items as a workload file: read back by `moelb ab`, with answers and groups."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks.probe.suite import Suite, to_request
from benchmarks.probe.tasks import TASKS
from benchmarks.probe.workload import main
from sglang_moelb.ab.workload_file import file_workload

NUM = 2 * len(TASKS)
app = typer.Typer()
app.command()(main)


def write(*arguments: str | Path) -> tuple[int, str]:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    return done.exit_code, done.output


def test_the_file_asks_what_the_evaluation_asks_with_answers_by_task(tmp_path: Path) -> None:
    out = tmp_path / "new" / "probe.jsonl"
    code, output = write("--items", str(NUM), "--seed", "3", "--out", out)
    assert code == 0, output
    requests = file_workload(out)
    suite = Suite(num_items=NUM, seed=3, tasks=tuple(TASKS))
    assert len(requests) == NUM
    for i, request in enumerate(requests):
        asked = to_request(suite[i].parts, i)
        assert request.messages == asked.messages
        assert (request.num_images, request.num_pixels) == (asked.num_images, asked.num_pixels)
        assert (request.answer, request.group) == (suite[i].answer, suite[i].task)
    assert Counter(r.group for r in requests) == dict.fromkeys(TASKS, 2)


def test_equal_seeds_write_equal_files_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert write("--items", "19", "--seed", str(seed), "--out", tmp_path / name)[0] == 0
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same != other


def test_tasks_may_be_chosen(tmp_path: Path) -> None:
    out = tmp_path / "probe.jsonl"
    assert write("--items", "4", "--tasks", "sum,digits", "--out", out)[0] == 0
    assert [r.group for r in file_workload(out)] == ["sum", "digits"] * 2


def test_an_unknown_task_or_a_place_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    code, output = write("--tasks", "juggle", "--out", tmp_path / "x")
    assert code == 2
    assert "there is no task 'juggle'" in output
    code, output = write("--items", "1", "--out", tmp_path)
    assert code == 2
    assert f"error: --out {tmp_path}: cannot be written" in output
