"""The lever replicate on a real server: ranks balanced, answers as stock SGLang's."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from sglang_moelb.demo.models import Kind

from .conftest import Serve, Server
from .talk import (
    CROWD_IMAGE,
    IMAGE,
    NO_CACHE,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_RANKS,
    NUM_SLOTS,
    ROOM,
    SETTINGS,
    SHORT,
    TEXT,
    TWO_IMAGES,
    Said,
    call,
    change,
    passes_of,
    said_under,
    say,
    say_together,
    status,
)

pytestmark = pytest.mark.e2e

KNOBS = {"min_rows": 1}
MODE = {"mode": "replicate", "replicate": KNOBS}
START = {**SETTINGS, "replicate": {**KNOBS, "slots": NUM_SLOTS}}
FLAGS = (*NO_CACHE, "--moelb-mode", "replicate", "--moelb-config", json.dumps(START))
HIDDEN, INNER = 128, 256  # of the demo models' experts
# float32 on CPU, where the rows of a token are added up rank by rank: a copy on another rank
# changes the order, and a sum of 4 rows rounds by a few of 2**-24 of its size in each of 4 layers.
TOLERANCE = 1e-4


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server with slots, in mode none."""
    server = serve("vl", *ROOM)
    change(server, {"mode": "none", **SETTINGS, "replicate": KNOBS})
    return server


def apart(one: Said, other: Said) -> float:
    """Largest distance of two log-probabilities of the prompt or the answer."""
    assert one.tokens == other.tokens
    pairs = [
        (a, b)
        for a, b in zip(
            one.prompt_logprobs + one.logprobs, other.prompt_logprobs + other.logprobs, strict=True
        )
        if a is not None and b is not None
    ]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("prompt", [IMAGE, TWO_IMAGES, TEXT], ids=["image", "images", "text"])
def test_ranks_are_balanced_and_greedy_tokens_are_those_of_stock(
    server: Server, prompt: Any
) -> None:
    exact, before = said_under(server, {"mode": "none"}, prompt)
    said, passes = said_under(server, MODE, prompt)
    (one,) = [p for p in passes if p["lever"] == "replicate"]
    assert one["phase"] == "prefill"
    assert one["rows_before_R"] == before[0]["rows_before_R"]
    assert sum(one["rows_after_R"]) == sum(one["rows_before_R"]), "no row is lost or made"
    assert max(one["balance_before_L"]) > 1.05
    assert max(one["balance_after_L"]) < 1.02
    assert 0 < sum(one["num_copies_R"]) <= NUM_SLOTS * NUM_RANKS * NUM_LAYERS
    assert one["lost_share"] == 0
    assert apart(said, exact) < TOLERANCE


def test_a_request_that_refuses_lossy_levers_takes_part(server: Server) -> None:
    refusal = {"moelb_lossy": False}
    exact, _ = said_under(server, {"mode": "none"}, IMAGE, custom_params=refusal)
    said, passes = said_under(server, MODE, IMAGE, custom_params=refusal)
    assert passes[0]["lever"] == "replicate"
    assert sum(passes[0]["num_protected_tokens_R"]) > 0
    assert max(passes[0]["balance_after_L"]) < 1.02
    assert apart(said, exact) < TOLERANCE


def test_small_passes_and_decode_are_left_alone_to_the_bit(server: Server) -> None:
    settings = {"capacity": {"min_batch_tokens": 100}}
    exact, _ = said_under(server, {"mode": "none", **settings}, SHORT)
    before = status(server)["replicate"]["num_replicated_layers"]
    said, passes = said_under(server, {**MODE, **settings}, SHORT)
    assert [p["lever"] for p in passes] == ["none"]
    assert "below min_batch_tokens 100" in passes[0]["gate_reason"]
    assert said == exact
    assert status(server)["replicate"]["num_replicated_layers"] == before
    said_under(server, MODE, TEXT, num_tokens=8)
    ran = status(server)["replicate"]["num_replicated_layers"] - before
    assert ran == NUM_LAYERS, "the one prefill, and none of seven decode passes"


def test_no_copy_pays_and_the_answer_is_that_of_none_to_the_bit(server: Server) -> None:
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    said, passes = said_under(server, {**MODE, "replicate": {"min_rows": 100_000}}, IMAGE)
    assert passes[0]["lever"] == "replicate"
    assert passes[0]["num_copies_R"] == [0] * NUM_RANKS
    assert passes[0]["rows_after_R"] == passes[0]["rows_before_R"]
    assert said == exact


def test_the_memory_that_is_held_is_told_and_cannot_change(server: Server) -> None:
    expert_bytes = 4 * (2 * INNER * HIDDEN + HIDDEN * INNER)
    now = status(server)
    assert now["memory"]["replicas_bytes"] == NUM_SLOTS * expert_bytes
    assert now["memory"]["kv_tokens_lost"] > 0
    assert now["replicate"]["num_slots"] == NUM_SLOTS
    assert now["topology"]["num_experts"] == NUM_EXPERTS
    assert "MiB replicas" in server.log.read_text()
    code, answer = call(server, "/moelb/config", {"replicate": {"slots": 4}})
    assert code == 400
    assert "restart the server with it" in answer["error"]


def test_the_kill_switch_ends_it_and_the_mode_brings_it_back(server: Server) -> None:
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    killed, passes = said_under(server, {**MODE}, IMAGE)
    assert passes[0]["lever"] == "replicate"
    killed, passes = said_under(server, {"kill": True}, IMAGE)
    assert [p["lever"] for p in passes] == ["none"]
    assert killed == exact
    assert status(server)["mode"] == "none"
    _, passes = said_under(server, MODE, IMAGE)
    assert passes[0]["lever"] == "replicate"


def test_switching_under_load_gives_the_answers_of_one_mode_or_the_other_and_no_third(
    server: Server,
) -> None:
    changes = {"none": {"mode": "none"}, "replicate": MODE, "drop": {"mode": "drop"}}
    known = {mode: said_under(server, changes[mode], TEXT)[0] for mode in changes}
    assert known["replicate"].tokens == known["none"].tokens
    assert known["drop"] != known["none"]
    ended = threading.Event()
    codes: list[int] = []

    def switch() -> None:
        for turn in range(24):
            mode = ("replicate", "none", "drop", "none")[turn % 4]
            codes.append(call(server, "/moelb/config", {"mode": mode})[0])
        ended.set()

    switching = threading.Thread(target=switch)
    switching.start()
    while not ended.is_set():
        assert say(server, TEXT) in known.values()
    switching.join()
    assert codes == [200] * 24
    change(server, MODE)
    passes = passes_of(server, lambda: say_together(server, [CROWD_IMAGE, TEXT] * 3))
    assert any(sum(one["num_copies_R"]) for one in passes)
    assert status(server)["controller"]["state"] == "running"


def test_auto_that_may_lose_nothing_takes_no_other_lever_and_answers_as_stock(
    server: Server,
) -> None:
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    limits = {"quality_budget": 0.0, "min_gain": 0.0, "switch_margin": 0.0, "interval_ms": 0.0}
    limits["downgrade_budget"] = 0.0
    change(server, {**MODE, "mode": "auto", "controller": limits})
    for _ in range(8):
        said: list[Said] = []
        passes = passes_of(server, lambda said=said: said.append(say(server, IMAGE)))
        # Whether copies pay depends on the machine: what they take is known from the tests before.
        assert {one["lever"] for one in passes} <= {"none", "replicate"}
        assert apart(said[0], exact) < TOLERANCE
    assert status(server)["controller"]["last_decision"]["reason"]
    assert status(server)["controller"]["state"] == "running"


@pytest.mark.slow
def test_four_ranks_are_balanced_and_tokens_are_those_of_stock(serve: Serve) -> None:
    server = serve("text", *FLAGS, ranks=4)
    change(server, {"mode": "none", **SETTINGS})
    exact, before = said_under(server, {"mode": "none"}, TEXT)
    said, passes = said_under(server, MODE, TEXT)
    (one,) = [p for p in passes if p["lever"] == "replicate"]
    assert len(one["rows_after_R"]) == 4
    assert sum(one["rows_after_R"]) == sum(before[0]["rows_before_R"])
    assert max(one["balance_after_L"]) < 1.02 < max(one["balance_before_L"])
    assert apart(said, exact) < TOLERANCE
    crowd = passes_of(server, lambda: say_together(server, [TEXT, SHORT] * 4))
    assert any(sum(one["num_copies_R"]) for one in crowd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kimi", "deepseek3"])
def test_models_with_shared_experts_and_other_routers_say_what_stock_says(
    serve: Serve, kind: Kind
) -> None:
    server = serve(kind, *FLAGS, "--trust-remote-code")
    exact, before = said_under(server, {"mode": "none"}, TEXT)
    said, passes = said_under(server, MODE, TEXT)
    (one,) = [p for p in passes if p["lever"] == "replicate"]
    assert sum(one["rows_after_R"]) == sum(before[0]["rows_before_R"])
    assert sum(one["num_copies_R"]) > 0
    assert max(one["balance_after_L"]) < max(one["balance_before_L"])
    assert apart(said, exact) < TOLERANCE
