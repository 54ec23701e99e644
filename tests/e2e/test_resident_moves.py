"""Resident replicas that follow a drifting load on a real server: they move, and answers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .conftest import Serve, Server
from .talk import IMAGE, SHORT, TEXT, call, say, status
from .test_exactness import Prompt
from .test_resident import MOVES, may_move

pytestmark = pytest.mark.e2e

MOST_REQUESTS, QUIET_REQUESTS = 200, 12
MOVE_MS = 20.0


@pytest.fixture(scope="module")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return may_move(serve, tmp_path_factory)


def balance(told: dict[str, Any], which: str) -> float:
    """Mean over layers of max/mean rank rows in the last prefill pass."""
    last = [one for one in told["recent"] if one["phase"] == "prefill"][-1]
    return float(np.mean(last[f"balance_{which}_L"]))


def let_move(server: Server) -> None:
    code, answer = call(server, "/moelb/config", {"resident": {"move_ms": MOVE_MS}})
    assert code == 200, answer


def send_until_quiet(server: Server, prompt: Prompt) -> tuple[float, dict[str, Any]]:
    """The same request until nothing has moved for a while: balance at first, and what is told."""
    quiet, first, num_done = 0, 0.0, -1
    for _ in range(MOST_REQUESTS):
        say(server, prompt, num_tokens=6)
        told = status(server)
        first = first or balance(told, "after")
        moved = told["resident"]
        still = moved["pending"] is None and moved["num_done"] == num_done
        quiet, num_done = quiet + 1 if still else 0, moved["num_done"]
        if quiet == QUIET_REQUESTS:
            return first, told
    raise AssertionError(told["resident"])


def test_replicas_follow_a_drifting_load_and_answers_stay_close(server: Server) -> None:
    said_before, before = say(server, SHORT, num_tokens=8), status(server)["resident"]
    assert (before["num_done"], before["num_failed"], before["pending"]) == (0, 0, None)
    let_move(server)
    first, text = send_until_quiet(server, TEXT)
    assert text["resident"]["num_done"] > 0
    assert balance(text, "after") < first
    drifted, image = send_until_quiet(server, IMAGE)
    moved = image["resident"]
    assert moved["num_done"] > text["resident"]["num_done"]
    assert balance(image, "after") < drifted
    assert moved["num_failed"] == 0
    assert moved["held"] != before["held"]
    assert moved["num_bytes"] > 0 < moved["stall_ms"]
    assert "layer" in image["controller"]["last_decision"]["resident"]
    assert "holds expert" in server.log.read_text()
    said = say(server, SHORT, num_tokens=8)
    pairs = zip(said.prompt_logprobs, said_before.prompt_logprobs, strict=True)
    apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    assert sum(apart) / len(apart) < 0.25, "other rows meet float8, and nothing else changes"


def test_moves_are_stopped_and_let_go_on_while_serving(server: Server) -> None:
    send_until_quiet(server, IMAGE)
    code, answer = call(server, "/moelb/config", {"resident": {"recalibrate": False}})
    assert code == 400
    assert "resident.recalibrate" in answer["error"]
    code, answer = call(server, "/moelb/config", {"resident": {"move_ms": 0}})
    assert code == 200
    assert answer["config"]["resident"]["move_ms"] == 0
    say(server, IMAGE, num_tokens=2)
    stopped = status(server)
    assert stopped["policy"]["move_ms"] == 0
    for _ in range(3 * MOVES["window_passes"]):
        say(server, TEXT, num_tokens=2)
    later = status(server)
    assert later["resident"]["held"] == stopped["resident"]["held"]
    assert later["resident"]["stall_ms"] == stopped["resident"]["stall_ms"]
    assert later["memory"] == stopped["memory"]
    let_move(server)
    _, moved = send_until_quiet(server, TEXT)
    assert moved["resident"]["num_done"] > later["resident"]["num_done"]
