"""The evaluation against a fake server: right counts, comparisons, failures, bad input."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks.probe.evaluate import main
from benchmarks.probe.result import Evaluation, read_result
from benchmarks.probe.suite import ProbeError, Requests, Suite, digest, parse_tasks
from benchmarks.probe.tasks import TASKS
from tests.probe.fake_server import Fake, answers_of, serving

NUM = 38
SUITE = Suite(num_items=NUM, seed=0, tasks=tuple(TASKS))
ANSWERS = answers_of(SUITE)

app = typer.Typer()
app.command()(main)


def evaluate(*arguments: str | Path) -> Result:
    """Run the command; its output has no line breaks but between lines."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


def ask(url: str, out: Path, *more: str | Path) -> Result:
    return evaluate("--url", url, "--items", str(NUM), "--out", out, *more)


def load(out: Path) -> Evaluation:
    return msgspec.json.decode(out.read_bytes(), type=Evaluation)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a server that is always right."""
    out = tmp_path_factory.mktemp("reference") / "eval.json"
    with serving(Fake(answers=ANSWERS)) as url:
        assert ask(url, out).exit_code == 0
    return out


def test_all_is_right_at_a_server_that_knows_all(reference: Path) -> None:
    result = load(reference)
    assert not result.is_partial
    assert result.failure == ""
    assert result.average is not None
    assert result.average.value == 1.0
    rows = {row.name: row for row in result.accuracy}
    assert set(rows) == {"all", "vision", "text", *TASKS}
    assert rows["all"].num_items == rows["all"].num_correct == NUM
    assert rows["vision"].num_items == 30
    assert rows["text"].num_items == 8
    assert all(rows[task].num_items == 2 for task in TASKS)


def test_wrong_answers_are_counted_by_task_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, wrong_every=4)) as url:
        done = ask(url, out)
    assert done.exit_code == 0
    result = load(out)
    rows = {row.name: row for row in result.accuracy}
    wrong = [item for item in result.items if not item.is_correct]
    assert len(wrong) == len(range(0, NUM, 4))
    assert [item.text[:-1] for item in wrong] == [item.answer[:-1] for item in wrong]
    assert rows["all"].accuracy == pytest.approx(1 - len(wrong) / NUM)
    low, high = rows["all"].interval
    assert low < rows["all"].accuracy < high
    assert re.search(r"all +│ +38 │ +28 │ +73\.7%", done.output)
    assert "average over tasks 73.7%" in done.output


def test_a_reference_file_is_compared_item_by_item(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, wrong_every=4, shift=0.25)) as url:
        assert ask(url, out, "--reference", reference).exit_code == 0
    rows = {row.name: row for row in load(out).comparison}
    row = rows["all"]
    assert (row.num_pairs, row.num_lost, row.num_won) == (NUM, 10, 0)
    assert row.difference.value == pytest.approx(-10 / NUM)
    assert row.difference.interval[1] < 0
    assert row.p_value == pytest.approx(2 / 2**10)
    assert row.agreement.value == pytest.approx(28 / NUM)
    assert row.logprob_distance is not None
    assert row.logprob_distance.value == pytest.approx(0.25)
    assert row.max_logprob_distance == pytest.approx(0.25)
    assert rows["vision"].num_pairs + rows["text"].num_pairs == NUM
    assert 0 < row.smallest_difference < 0.5


def test_a_server_differs_in_nothing_from_itself(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, wrong_every=5)) as url:
        assert ask(url, out, "--reference-url", url + "/").exit_code == 0
    for row in load(out).comparison:
        assert row.num_lost == row.num_won == 0
        assert row.p_value == 1.0
        assert row.agreement.value == row.token_share == 1.0
        assert row.logprob_distance is not None
        assert row.logprob_distance.value == 0.0


def test_what_came_before_a_server_stopped_is_kept_and_marked_partial(
    reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, die_after=20)) as url:
        done = ask(url, out, "--concurrency", "1", "--reference", reference)
    assert done.exit_code == 1
    result = load(out)
    assert result.is_partial
    assert len(result.items) == 20
    assert result.num_items == NUM
    assert "the server stopped answering" in result.failure
    assert "after 20 of 38 items" in result.failure
    assert result.comparison[0].num_pairs == 20
    assert "PARTIAL, 20 of 38 items" in done.output
    assert "partial: the server stopped answering" in done.output


def test_a_refused_item_does_not_count_and_makes_the_result_partial(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, refuse_every=10)) as url:
        done = ask(url, out)
    assert done.exit_code == 1
    result = load(out)
    assert result.accuracy[0].num_items == NUM - 3
    assert result.is_partial
    assert "3 requests failed, the last with: HTTP 400: refused" in result.failure


def test_a_server_that_refuses_on_and_on_is_given_up(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(fake := Fake(answers=ANSWERS, refuse_every=2)) as url:
        done = ask(url, out, "--concurrency", "1")
    assert done.exit_code == 1
    assert fake.num_asked == 20
    assert "10 requests failed, the last: HTTP 400" in load(out).failure


def test_an_item_whose_connection_broke_is_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(fake := Fake(answers=ANSWERS, break_at=(9, 30))) as url:
        done = ask(url, out)
    assert done.exit_code == 0
    result = load(out)
    assert not result.is_partial
    assert [item.is_correct for item in result.items] == [True] * NUM
    assert fake.num_asked >= NUM + 2


def test_a_server_whose_connections_break_on_and_on_is_given_up(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with serving(Fake(answers=ANSWERS, break_at=(9, 12, 15))) as url:
        done = ask(url, out, "--concurrency", "1")
    assert done.exit_code == 1
    result = load(out)
    assert "connections broke 3 times" in result.failure
    assert len(result.items) == 12


def test_requests_are_in_flight_together_but_no_more_than_asked(tmp_path: Path) -> None:
    with serving(fake := Fake(answers=ANSWERS)) as url:
        ask(url, tmp_path / "eval.json", "--concurrency", "4")
    assert 2 <= fake.max_in_flight <= 4


def test_no_server_is_one_line_that_names_the_flag(tmp_path: Path) -> None:
    done = ask("http://127.0.0.1:9", tmp_path / "eval.json")
    assert done.exit_code == 2
    assert "error: --url http://127.0.0.1:9: no answer to /v1/models" in done.output
    assert not (tmp_path / "eval.json").exists()


def test_an_address_that_is_none_is_one_line_too(tmp_path: Path) -> None:
    done = ask("localhost:30000", tmp_path / "eval.json")
    assert done.exit_code == 2
    assert "error: --url localhost:30000: no answer to /v1/models" in done.output
    done = ask("http://127.0.0.1:9", tmp_path)
    assert done.exit_code == 2
    assert "is a folder. Give a file" in done.output


def test_another_tokenizer_is_refused_before_a_question_is_asked(tmp_path: Path) -> None:
    with serving(fake := Fake(answers=ANSWERS, num_extra_tokens=-3)) as url:
        done = ask(url, tmp_path / "eval.json")
    assert done.exit_code == 2
    assert "reads a prompt of 254 tokens as 251" in done.output
    assert "its tokenizer, chat template or image processor is not the probe's" in done.output
    assert fake.num_asked == 0


def test_a_server_without_images_or_log_probabilities_is_refused(tmp_path: Path) -> None:
    with serving(Fake(has_images=False)) as url:
        assert "refused a question with two images (HTTP 400" in ask(url, tmp_path / "a").output
    with serving(Fake(has_logprobs=False)) as url:
        assert "sends no log-probabilities" in ask(url, tmp_path / "a").output


def test_an_unknown_task_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    done = ask("http://127.0.0.1:9", tmp_path / "eval.json", "--tasks", "digits,juggle")
    assert done.exit_code == 2
    assert "there is no task 'juggle'. Use some of digits,word," in done.output


def test_a_reference_must_be_a_whole_result_of_the_same_items(
    reference: Path, tmp_path: Path
) -> None:
    url, out = "http://127.0.0.1:9", tmp_path / "eval.json"
    done = ask(url, out, "--reference", tmp_path / "none.json")
    assert "cannot be read (No such file or directory)" in done.output
    cut = tmp_path / "cut.json"
    cut.write_bytes(reference.read_bytes()[:1000])
    with pytest.raises(ProbeError, match="is no result of an evaluation"):
        read_result(cut)
    done = ask(url, out, "--reference", reference, "--seed", "7")
    assert "was evaluated with --seed 0, this run has --seed 7" in done.output
    saved = load(reference)
    changed = [msgspec.structs.replace(item, digest=item.digest ^ 1) for item in saved.items]
    other = tmp_path / "other.json"
    other.write_bytes(msgspec.json.encode(msgspec.structs.replace(saved, items=tuple(changed))))
    done = ask(url, out, "--reference", other)
    assert done.exit_code == 2
    assert "was another question there" in done.output
    done = ask(url, out, "--reference", reference, "--reference-url", url)
    assert "give one of them, not both" in done.output


def test_tasks_take_turns_and_the_same_seed_gives_the_same_items() -> None:
    suite = Suite(num_items=7, seed=4, tasks=("sum", "copy"))
    items = [suite[i] for i in range(7)]
    assert [item.task for item in items] == ["sum", "copy"] * 3 + ["sum"]
    assert {item.split for item in items} == {"test"}
    assert list(map(digest, items)) == [digest(suite[i]) for i in range(7)]
    other = Suite(num_items=7, seed=5, tasks=("sum", "copy"))
    assert list(map(digest, items)) != [digest(other[i]) for i in range(7)]
    requests = Requests(suite, range(7))
    assert [r.request_id for r in requests] == list(range(7))
    assert requests[0].kind == "text"


def test_tasks_are_named_once_each_in_any_order() -> None:
    assert parse_tasks("") == tuple(TASKS)
    assert parse_tasks("sum, digits,sum") == ("sum", "digits")
