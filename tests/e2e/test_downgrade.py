"""The lever downgrade on a real server: who is lowered, and that all others are served alike."""

from __future__ import annotations

import threading

import pytest

from .conftest import Serve, Server
from .talk import (
    CROWD_IMAGE,
    IMAGE,
    LOW_RULE,
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

LOW = {"mode": "downgrade", "downgrade": LOW_RULE}
HIDDEN, INNER = 128, 256  # of the demo models' experts


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server with slots, in mode none."""
    server = serve("vl", *ROOM)
    change(server, {"mode": "none", **SETTINGS})
    return server


def apart(one: Said, other: Said) -> float:
    """Mean distance of the prompt's log-probabilities."""
    pairs = [
        (a, b)
        for a, b in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
        if a is not None and b is not None
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_a_hot_rank_of_images_is_lowered_and_answers_stay_close(server: Server) -> None:
    exact, before = said_under(server, {"mode": "none"}, IMAGE)
    assert all(one["low_ranks"] == [] for one in before)
    lowered, passes = said_under(server, LOW, IMAGE)
    (one,) = [p for p in passes if p["lever"] == "downgrade"]
    assert one["phase"] == "prefill"
    assert len(one["low_ranks"]) == NUM_LAYERS
    assert any(one["low_ranks"])
    assert all(len(ranks) <= NUM_RANKS - 1 for ranks in one["low_ranks"]), "not all are above"
    assert 0 < sum(one["low_rows_R"]) < sum(one["rows_before_R"])
    assert one["rows_after_R"] == one["rows_before_R"], "routing stays"
    assert one["lost_share"] == 0
    assert lowered != exact
    assert apart(lowered, exact) < 0.25


@pytest.mark.parametrize("form", ["experts", "fewest"])
def test_the_other_forms_lower_some_rows_and_fewer_than_the_rank(server: Server, form: str) -> None:
    whole = said_under(server, LOW, IMAGE)[1][0]
    exact = said_under(server, {"mode": "none"}, IMAGE)[0]
    said, passes = said_under(server, {**LOW, "downgrade": {**LOW_RULE, "form": form}}, IMAGE)
    assert 0 < sum(passes[0]["low_rows_R"]) < sum(whole["low_rows_R"])
    assert said != exact
    assert apart(said, exact) < 0.25


def test_text_is_never_lowered_and_answered_to_the_bit(server: Server) -> None:
    exact, _ = said_under(server, {"mode": "none"}, TEXT)
    said, passes = said_under(server, LOW, TEXT)
    assert [p["lever"] for p in passes] == ["downgrade"]
    assert passes[0]["low_ranks"] == []
    assert max(passes[0]["balance_before_L"]) > 1, "a rank was above the mean"
    assert said == exact


def test_nothing_is_lowered_below_the_factor_and_answers_are_equal_to_the_bit(
    server: Server,
) -> None:
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    # of two ranks none can have more than twice the mean
    changes = {**LOW, "downgrade": {**LOW_RULE, "factor": 2.0}}
    said, passes = said_under(server, changes, IMAGE)
    assert passes[0]["lever"] == "downgrade"
    assert passes[0]["low_ranks"] == []
    assert said == exact


def test_a_request_that_refuses_is_computed_at_the_models_precision(server: Server) -> None:
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    refusal = {"moelb_lossy": False}
    said, passes = said_under(server, LOW, IMAGE, custom_params=refusal)
    assert passes[0]["lever"] == "downgrade"
    assert passes[0]["low_ranks"] == []
    assert said == exact


def test_decode_is_never_lowered(server: Server) -> None:
    everyone = {"mode": "downgrade", "downgrade": {**LOW_RULE, "factor": 1e-6, "vision_share": 0.0}}
    before = status(server)["downgrade"]["num_low_layers"]
    _, passes = said_under(server, everyone, TWO_IMAGES, num_tokens=8)
    assert passes[0]["low_rows_R"] == passes[0]["rows_before_R"]
    lowered = status(server)["downgrade"]["num_low_layers"] - before
    assert lowered == NUM_LAYERS, "the one prefill, and none of seven decode passes"


@pytest.mark.parametrize("refuses", [False, True])
def test_decode_beside_a_prefill_keeps_its_ranks_high_only_if_it_refuses(
    server: Server, refuses: bool
) -> None:
    """Requests go to the ranks in turn, so one rank decodes while the other prefills."""
    everyone = {"mode": "downgrade", "downgrade": {**LOW_RULE, "factor": 1e-6, "vision_share": 0.0}}
    change(server, everyone)
    asked = {"num_tokens": 40, "custom_params": {"moelb_lossy": not refuses}}

    def meet() -> None:
        decoding = threading.Thread(target=say, args=(server, SHORT), kwargs=asked)
        decoding.start()
        for _ in range(3):
            say(server, CROWD_IMAGE, num_tokens=1)
        decoding.join()

    met = [
        one
        for one in passes_of(server, meet)
        if one["lever"] == "downgrade"
        and 0 < sum(one["num_protected_tokens_R"]) < sum(one["num_tokens_R"])
    ]
    assert met
    for one in met:
        assert one["phase"] == "prefill"
        assert (sum(one["num_refused_tokens_R"]) > 0) == refuses
        assert (one["low_rows_R"] == one["rows_before_R"]) == (not refuses)


def test_the_memory_that_is_held_is_told_with_what_it_costs(server: Server) -> None:
    weights = NUM_EXPERTS // NUM_RANKS * (2 * INNER * HIDDEN + HIDDEN * INNER)
    memory = status(server)["memory"]
    assert memory["staging_bytes"] == 2 * (weights + weights // 128**2 * 4)
    assert memory["resident_bytes"] == 0
    assert memory["replicas_bytes"] == NUM_SLOTS * 4 * (2 * INNER * HIDDEN + HIDDEN * INNER)
    assert memory["kv_tokens_lost"] > 0
    assert "MiB staging" in server.log.read_text()
    code, answer = call(server, "/moelb/config", {"downgrade": {"slots": 1}})
    assert code == 400
    assert "restart the server with it" in answer["error"]


def test_a_crowd_is_served_and_the_budget_ends_it(server: Server) -> None:
    change(server, LOW)
    passes = passes_of(server, lambda: say_together(server, [CROWD_IMAGE, TEXT] * 3))
    assert any(sum(one["low_rows_R"]) for one in passes)
    assert status(server)["downgrade"]["num_host_waits"] == 0
    change(server, {**LOW, "controller": {"downgrade_budget": 0.0}})
    passes = passes_of(server, lambda: say(server, IMAGE))
    assert [one["lever"] for one in passes] == ["none"]
    assert "downgrade_budget is 0" in status(server)["controller"]["last_decision"]["reason"]
    change(server, {"controller": {"downgrade_budget": 1.0}})


@pytest.mark.parametrize(
    "num_switches", [20, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_switching_under_load_gives_the_answers_of_one_mode_or_the_other_and_no_third(
    server: Server, num_switches: int
) -> None:
    known = {
        mode: [said_under(server, changes, prompt)[0] for prompt in (IMAGE, TEXT)]
        for mode, changes in (("none", {"mode": "none"}), ("downgrade", LOW))
    }
    assert known["none"][0] != known["downgrade"][0]
    ended = threading.Event()
    codes: list[int] = []

    def switch() -> None:
        for turn in range(num_switches):
            mode = ("downgrade", "none")[turn % 2]
            codes.append(call(server, "/moelb/config", {"mode": mode})[0])
        ended.set()

    switching = threading.Thread(target=switch)
    switching.start()
    seen = {"none": 0, "downgrade": 0}
    while not ended.is_set() or min(seen.values()) == 0:
        for at, prompt in enumerate((IMAGE, TEXT)):
            said = say(server, prompt)
            assert said in (known["none"][at], known["downgrade"][at])
            if at == 0:
                seen["none" if said == known["none"][0] else "downgrade"] += 1
        if ended.is_set():
            call(server, "/moelb/config", {"mode": min(seen, key=lambda mode: seen[mode])})
    switching.join()
    assert codes == [200] * num_switches
    assert status(server)["controller"]["state"] == "running"
