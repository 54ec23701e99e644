from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ab.fake_server import (
    BALANCE_AFTER,
    BALANCE_BEFORE,
    LOST_MASS,
    NUM_LAYERS,
    PROMPT_TOKENS,
    ROUTED_MASS,
)
from ab.support import FAKE_SERVER, MAX_TOKENS, SilentProgress, fake_command, make_plan
from sglang_moelb.ab.cli import execute
from sglang_moelb.ab.compare import compare_runs
from sglang_moelb.ab.conditions import conditions
from sglang_moelb.ab.result import Result
from sglang_moelb.ab.run import run_plan
from sglang_moelb.ab.server import ServerError, pick_port
from sglang_moelb.ab.types import AbError, ArmRun, Plan, Request

SECTIONS = (
    "summary",
    "balance",
    "load",
    "decisions",
    "weight",
    "agreement",
    "quality",
    "latency",
    "conditions",
    "limits",
)


def run(plan: Plan) -> tuple[list[ArmRun], Result, SilentProgress]:
    progress = SilentProgress()
    runs = run_plan(plan, progress)
    return runs, compare_runs(runs, plan.requests, conditions(plan, None)), progress


@pytest.fixture
def running_server() -> Iterator[str]:
    port = pick_port(None)
    command = [sys.executable, str(FAKE_SERVER), "--port", str(port), "--plugin"]
    with subprocess.Popen(command) as process:
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole comparison, for the tests that only read it."""
    out = tmp_path_factory.mktemp("report")
    plan = make_plan(out, "stock=", "auto=--plugin --shift 0.25 --flip-every 2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang_moelb.ab.run.server_command", fake_command)
        assert execute(plan, Console(quiet=True))
    return out


def test_the_report_has_every_section(report: Path) -> None:
    html = (report / "report.html").read_text()
    for section in SECTIONS:
        assert f'<h2 id="{section}">' in html


def test_the_numbers_of_the_report_are_the_servers(report: Path) -> None:
    html = (report / "report.html").read_text()
    result = json.loads((report / "result.json").read_text())
    stock, auto = result["arms"]
    everything = stock["served"][0]
    assert everything["num_requests"] == 20
    assert everything["num_prompt_tokens"] == 20 * PROMPT_TOKENS
    assert everything["num_output_tokens"] == 20 * MAX_TOKENS
    passes = auto["passes"]
    assert stock["passes"] is None
    assert passes["num_passes"] == passes["num_seen"] == 40  # two a request, without the warm-up
    assert [layer["before_mean"] for layer in passes["layers"]] == pytest.approx(BALANCE_BEFORE)
    assert passes["balance_after_acted"] == pytest.approx(sum(BALANCE_AFTER) / NUM_LAYERS)
    acted = passes["num_by_lever"]["drop"]
    assert passes["lost_share"] == pytest.approx(acted * LOST_MASS / (40 * ROUTED_MASS))
    row = auto["agreement"][0]
    assert row["distance_equal"]["mean"] == pytest.approx(0.25)
    assert 0 < row["num_equal"] < row["num_pairs"] == 20
    assert f"{row['num_equal']}/20" in html
    assert row["token_share"] == pytest.approx(1 - (20 - row["num_equal"]) / (20 * MAX_TOKENS))
    for share in (passes["lost_share"], passes["overhead_share"]):
        assert f"{share * 100:.2g} %" in html or f"{share * 100:.1f} %" in html


def test_the_page_needs_no_other_file_and_every_plot_is_beside_it(report: Path) -> None:
    html = (report / "report.html").read_text()
    assert not re.search(r'(?:src|srcset|href)="(?!data:)', html)
    names = {path.stem for path in report.glob("*.png")}
    assert names == {
        "throughput",
        "latency",
        "logprob-distance",
        "auto-balance",
        "auto-load",
        "auto-levers",
        "auto-weight",
    }
    assert html.count("data:image/png") == 2 * len(names)  # for light and for dark pages


@pytest.mark.usefixtures("fake_servers")
def test_equal_servers_agree_entirely_and_each_request_is_sent_once_a_round(
    tmp_path: Path,
) -> None:
    plan = make_plan(tmp_path, "a=", "b=")
    runs, result, progress = run(plan)
    for row in [*result.arms[1].agreement, *result.repeat]:
        assert (row.equal_share, row.token_share) == (1.0, 1.0)
        assert row.distance_all is not None
        assert row.distance_all.max == 0.0
    for arm in runs:
        sent = [(o.round, o.request_id) for o in arm.outcomes]
        assert sent == [(r, i) for r in range(2) for i in range(10)]
        assert not any(o.error for o in arm.outcomes)
    assert progress.num_done == {"a": 23, "b": 23}


@pytest.mark.usefixtures("fake_servers")
def test_log_probabilities_left_out_of_the_stream_do_not_shift_the_others(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "full=--tool-call-parser x", "part=", common_flags=())
    runs, result, _ = run(plan)
    row = result.arms[1].agreement[0]
    assert (row.equal_share, row.logprob_coverage) == (1.0, 0.75)
    assert row.distance_all is not None
    assert row.distance_all.max == 0.0
    assert {outcome.logprobs[3] for outcome in runs[1].outcomes} == {None}


@pytest.mark.usefixtures("fake_servers")
def test_no_connection_is_used_twice_so_that_none_is_closed_under_a_request(tmp_path: Path) -> None:
    _, result, _ = run(make_plan(tmp_path, "a=--one-a-connection", "b="))
    assert result.arms[0].failures == {}


@pytest.mark.usefixtures("fake_servers")
def test_abba_pairs_the_rounds_of_both_sessions(tmp_path: Path) -> None:
    runs, result, _ = run(make_plan(tmp_path, "a=", "b=--plugin", order="ABBA"))
    assert [len(arm.sessions) for arm in runs] == [2, 2]
    assert len(result.arms[0].wall_s) == 4
    assert result.arms[1].agreement[0].num_pairs == 40
    passes = result.arms[1].passes
    assert passes is not None
    assert passes.num_passes == 80


@pytest.mark.usefixtures("fake_servers")
def test_a_server_that_dies_at_start_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="does not know: --die-at-start") as caught:
        run(make_plan(tmp_path, "a=--die-at-start", "b="))
    assert "arm a" in str(caught.value)
    assert "exit code 1" in str(caught.value)


@pytest.mark.usefixtures("fake_servers")
def test_a_second_server_that_dies_at_start_leaves_the_first_arms_report(tmp_path: Path) -> None:
    assert not execute(make_plan(tmp_path, "a=", "b=--die-at-start"), Console(quiet=True))
    html = (tmp_path / "report.html").read_text()
    assert "b did not finish" in html
    assert "--die-at-start" in html
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["arms"][0]["served"][0]["num_failed"] == 0
    assert result["arms"][1]["served"] == []


@pytest.mark.usefixtures("fake_servers")
def test_a_server_that_dies_in_the_middle_keeps_what_came_before(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "a=", "b=--plugin --die-after 18")  # 3 warm-up, 10 + 5 more
    assert not execute(plan, Console(quiet=True))
    result = json.loads((tmp_path / "result.json").read_text())
    first, second = result["arms"]
    assert first["failure"] == ""
    assert "exit code 7" in second["failure"]
    everything = second["served"][0]
    assert everything["num_requests"] == 20
    assert 5 <= everything["num_failed"] < 20
    assert everything["output_tok_s"]["rounds"] != []  # the first round was whole
    assert second["agreement"][0]["equal_share"] == 1.0
    assert "b did not finish" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("fake_servers")
def test_refused_requests_are_counted_with_their_reason(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "a=", "b=")
    bad = Request(
        request_id=0,
        messages=({"role": "user", "content": "REFUSE"},),
        num_images=0,
        num_chars=6,
    )
    plan = dataclasses.replace(plan, requests=(bad, *plan.requests[1:]))
    _, result, _ = run(plan)
    for arm in result.arms:
        assert arm.failures == {"HTTP 400: refused": 2}
        assert arm.failure == ""


def test_a_running_server_is_an_arm_and_is_left_running(
    tmp_path: Path, running_server: str
) -> None:
    plan = make_plan(tmp_path, urls=(f"a={running_server}", f"b={running_server}"))
    runs, result, _ = run(plan)
    assert all(arm.passes is not None for arm in result.arms)
    assert result.arms[1].agreement[0].equal_share == 1.0
    assert not any(arm.command for arm in runs)
    host, _, port = running_server.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) == 0


def test_a_url_where_nothing_listens_fails_every_request_with_the_reason(tmp_path: Path) -> None:
    port = pick_port(None)
    url = f"http://127.0.0.1:{port}"
    _, result, _ = run(make_plan(tmp_path, urls=(f"a={url}", f"b={url}")))
    assert "no connection" in result.arms[0].failure
    assert result.arms[0].served[0].num_failed == 20


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(AbError, match=f"--port {port}: cannot be used"):
            pick_port(port)
