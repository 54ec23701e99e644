"""The content of the demo: the trained probe where the repository is at hand, else a tiny model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moelb.ab.types import AbError
from sglang_moelb.demo import __main__ as demo
from sglang_moelb.demo import probe


def test_the_repository_has_the_probe_and_another_folder_has_not(tmp_path: Path) -> None:
    folder = probe.find_checkpoint()
    assert folder is not None
    assert (folder / "model.safetensors").is_file()
    assert probe.find_checkpoint(tmp_path) is None


def test_one_request_in_twenty_shows_photographs_and_the_others_have_answers(
    tmp_path: Path,
) -> None:
    requests = probe.probe_workload(80, seed=1, out=tmp_path / "items.jsonl")
    assert [request.request_id for request in requests] == list(range(80))
    photos = [request for request in requests if request.answer is None]
    assert len(photos) == 4
    assert {request.kind for request in photos} == {"image"}
    assert len({request.num_pixels for request in photos}) > 1
    tasks = Counter(request.group for request in requests if request.answer is not None)
    assert len(tasks) == 19
    assert set(tasks.values()) == {4}
    assert requests == probe.probe_workload(80, seed=1, out=tmp_path / "again.jsonl")
    assert [r.group for r in requests] != sorted(r.group for r in requests)


def test_fewer_than_twenty_requests_show_no_photograph(tmp_path: Path) -> None:
    requests = probe.probe_workload(3, seed=0, out=tmp_path / "items.jsonl")
    assert all(request.answer for request in requests)


def test_a_writer_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(AbError, match="could not be written") as caught:
        probe.probe_workload(3, seed=0, out=tmp_path / "items.jsonl", root=tmp_path)
    assert "benchmarks" in str(caught.value)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[demo.Plan]:
    """The plans that the demo would run."""
    plans: list[demo.Plan] = []

    def keep(plan: demo.Plan, console: object) -> bool:
        plans.append(plan)
        return True

    monkeypatch.setattr(demo, "execute", keep)
    return plans


def run_demo(out: Path, *arguments: str) -> str:
    app = demo.typer.Typer()
    app.command()(demo.demo)
    done = CliRunner().invoke(app, ["--out", str(out), *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_demo_serves_the_probe_and_judges_its_answers(
    tmp_path: Path, planned: list[demo.Plan]
) -> None:
    output = run_demo(tmp_path, "--num-requests", "40")
    assert "random weights" not in output
    (plan,) = planned
    assert plan.model == str(probe.find_checkpoint())
    assert sum(request.answer is not None for request in plan.requests) == 38
    longest = max(len(request.answer or "") for request in plan.requests)
    assert plan.max_tokens > longest  # a token a character, and one that ends the answer


def test_without_the_repository_the_demo_serves_a_tiny_model_and_says_so(
    tmp_path: Path, planned: list[demo.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_checkpoint", lambda: None)
    monkeypatch.setattr(demo, "write_model", lambda kind, folder: folder)
    output = run_demo(tmp_path)
    assert "no trained probe beside this package" in output
    (plan,) = planned
    assert plan.model == str(tmp_path / "models" / "vl")
    assert len(plan.requests) == demo.NUM_REQUESTS
    assert all(request.answer is None for request in plan.requests)


def test_a_model_of_the_users_gets_the_workload_without_answers(
    tmp_path: Path, planned: list[demo.Plan]
) -> None:
    run_demo(tmp_path, "--model", "some/model", "--num-requests", "7")
    (plan,) = planned
    assert (plan.model, len(plan.requests)) == ("some/model", 7)
    assert all(request.answer is None for request in plan.requests)
