"""Whatever happens to the controller, the server goes on serving, in `none`, and says so."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from .conftest import Serve, Server
from .talk import SHORT, TEXT, call, change, observed, say, status, until
from .test_metrics import scrape

pytestmark = pytest.mark.e2e

DROP: dict[str, Any] = {"mode": "drop", "capacity": {"min_batch_tokens": 16, "factor": 0.5}}


def fault(server: Server, kind: str) -> None:
    body = {"fault": {"controller": kind}, "controller": {"timeout_ms": 100.0}}
    code, answer = call(server, "/moelb/config", body)
    assert code == 200, answer


def send(server: Server, number: int) -> None:
    """A signal to the controller process."""
    os.kill(status(server)["controller"]["process_id"], number)


def up(server: Server) -> float:
    samples = scrape(server)["moelb_controller_state"].samples
    return sum(s.value for s in samples if s.labels["state"] == "running")


@pytest.mark.parametrize("how", ["fault", "signal"])
def test_a_hung_controller_means_none_until_it_answers_again(serve: Serve, how: str) -> None:
    server = observed(serve)
    exact = say(server, TEXT)
    change(server, DROP)
    assert say(server, TEXT) != exact
    change(server, {"controller": {"timeout_ms": 100.0}})
    if how == "fault":
        fault(server, "hang")
    else:
        send(server, signal.SIGSTOP)
    say(server, SHORT, num_tokens=8)

    def hung() -> bool:
        say(server, SHORT, num_tokens=2)
        return bool(status(server)["controller"]["state"] == "hung")

    until(hung)
    assert say(server, TEXT) == exact, "nothing is dropped while nobody controls"
    now = status(server)
    assert now["policy"]["lever"] == "none"
    assert now["policy"]["reason"] == "controller process is hung"
    assert up(server) == 0
    if how == "fault":
        fault(server, "none")
    else:
        send(server, signal.SIGCONT)
    until(lambda: status(server)["controller"]["state"] == "running")
    change(server, {"controller": {"timeout_ms": 5000.0}})
    assert say(server, TEXT) != exact, "the lever is back"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("signal", "killed by SIGKILL"),
        pytest.param(
            "fault", "RuntimeError: fault.controller is 'die'", marks=pytest.mark.slow
        ),
    ],
)
def test_a_dead_controller_means_none_within_one_pass_and_no_change_is_taken(
    serve: Serve, how: str, why: str
) -> None:
    server = observed(serve)
    exact = say(server, TEXT)
    change(server, DROP)
    assert say(server, TEXT) != exact
    totals = status(server)["totals"]
    if how == "fault":
        fault(server, "die")
    else:
        send(server, signal.SIGKILL)
    until(lambda: status(server)["controller"]["state"] == "dead")
    config = status(server)["config"]
    assert say(server, TEXT) == exact, "the very next pass is in none"
    now = status(server)
    assert now["policy"]["lever"] == "none"
    assert now["policy"]["reason"] == f"controller process is dead: {why}"
    assert now["totals"]["num_passes"] >= totals["num_passes"], "what was counted is still shown"
    assert up(server) == 0
    for body in ({"mode": "drop"}, {"kill": True}):
        code, answer = call(server, "/moelb/config", body)
        assert code == 503
        assert "restart the server" in answer["error"].lower()
    assert status(server)["config"] == config
    assert say(server, TEXT) == exact
