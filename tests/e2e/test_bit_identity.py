"""With `none` and `observe` the server says to the bit what SGLang says without us.

One request at a time, so that batches are the same; tokens and every log-probability are compared
for equality, not closeness.
"""

from __future__ import annotations

import pytest

from .conftest import Serve, Server
from .talk import (
    ALONE,
    IMAGE,
    NO_CACHE,
    OBSERVE,
    ROOM,
    SETTINGS,
    SHORT,
    TEXT,
    Said,
    call,
    change,
    observed,
    said_in_observe,
    say,
    status,
)

pytestmark = pytest.mark.e2e

PROMPTS = {"vl": ALONE, "text": (TEXT, SHORT)}
_said: dict[str, list[Said]] = {}


def say_all(server: Server, kind: str) -> list[Said]:
    return [say(server, prompt) for prompt in PROMPTS[kind]]


def test_answers_in_observe_and_none_are_collected_and_equal_each_other(serve: Serve) -> None:
    server = observed(serve)
    _said["vl-observe"] = list(said_in_observe(serve).values())
    assert status(server)["totals"]["num_prefill_passes"] >= 4, "the balancer saw the passes"
    change(server, {"mode": "none"})
    _said["vl-none"] = say_all(server, "vl")
    assert _said["vl-none"] == _said["vl-observe"]


def test_a_lever_would_change_the_answers(serve: Serve) -> None:
    """So the comparison is one that can fail."""
    server = observed(serve)
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    assert say(server, TEXT) != _said["vl-observe"][2]
    assert say(server, IMAGE) != _said["vl-observe"][0]


def test_room_for_levers_changes_no_answer_in_observe_and_none(serve: Serve) -> None:
    server = serve("vl", *ROOM)
    for mode in ("observe", "none"):
        change(server, {"mode": mode, **SETTINGS})
        assert say_all(server, "vl") == _said["vl-none"]
    assert status(server)["totals"]["num_passes_by_lever"]["none"] >= 8


def test_without_flags_nothing_is_there_and_the_multimodal_answers_are_the_same(
    serve: Serve,
) -> None:
    server = serve("vl", *NO_CACHE)
    assert call(server, "/moelb/status")[0] == 404
    assert call(server, "/moelb/config", {"mode": "drop"})[0] == 404
    code, info = call(server, "/server_info")
    assert code == 200
    assert all("moelb" not in state for state in info["internal_states"])
    stock = say_all(server, "vl")
    assert stock == _said["vl-observe"]
    assert stock == _said["vl-none"]
    assert len({said.tokens for said in stock}) == len(stock)


def test_text_with_tensor_parallel_attention_without_flags(serve: Serve) -> None:
    server = serve("text", *NO_CACHE, attention_dp=False)
    _said["text-stock"] = say_all(server, "text")


def test_text_with_tensor_parallel_attention_in_observe_and_none(serve: Serve) -> None:
    server = serve("text", *OBSERVE, attention_dp=False)
    assert say_all(server, "text") == _said["text-stock"]
    recent = [p for p in status(server)["recent"] if p["phase"] == "prefill"]
    assert all(min(p["num_tokens_R"]) > 0 for p in recent[-2:]), "each rank has its share of rows"
    change(server, {"mode": "none"})
    assert say_all(server, "text") == _said["text-stock"]
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    assert say(server, TEXT) != _said["text-stock"][0]
