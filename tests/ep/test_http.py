"""Laws of `/moelb/config` and `/moelb/status`, over a tokenizer manager that records requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from sglang_moelb.config import Config, flat, merge
from sglang_moelb.ep.http import DEAD, Routes
from sglang_moelb.hot_config import (
    KNOB_PREFIX,
    START_KNOBS,
    as_started,
    from_numbers,
    to_numbers,
    without_replicas,
    without_slots,
)

pytest.importorskip("sglang.srt.managers.io_struct")

START = as_started(merge(Config(), {"mode": "observe"}))


class Manager:
    """Two ranks behind SGLang's tokenizer manager."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.answers = [True, True]
        self.states: list[dict[str, Any]] = [
            {"moelb": {"controller": {"state": "running"}, "rank": 0}},
            {"moelb": {"controller": {"state": "off"}, "rank": 1}},
        ]

    async def get_internal_state(self) -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        return self.states

    async def set_internal_state(self, request: Any) -> list[bool]:
        await asyncio.sleep(0.002)
        self.sent.append(dict(request.server_args))
        return self.answers

    def config(self) -> Config:
        """What the ranks were told last."""
        return from_numbers(
            {k.removeprefix(KNOB_PREFIX): v for k, v in self.sent[-1].items()}, START
        )


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def routes(manager: Manager) -> Routes:
    return Routes(manager, START)


def change(routes: Routes, body: Any) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(routes.change(raw))


def test_a_change_reaches_the_ranks_whole_and_is_answered_with_the_configuration(
    routes: Routes, manager: Manager
) -> None:
    code, answer = change(routes, {"mode": "drop", "capacity": {"factor": 1.5}})
    wanted = merge(START, {"mode": "drop", "capacity": {"factor": 1.5}})
    assert (code, answer) == (200, {"config": msgspec.to_builtins(wanted)})
    assert manager.sent == [{KNOB_PREFIX + k: v for k, v in to_numbers(wanted).items()}]


def test_changes_are_laid_over_one_another(routes: Routes, manager: Manager) -> None:
    change(routes, {"mode": "drop"})
    change(routes, {"capacity": {"level": "expert"}})
    assert manager.config() == merge(START, {"mode": "drop", "capacity": {"level": "expert"}})


def test_changes_at_the_same_time_are_not_lost(routes: Routes, manager: Manager) -> None:
    async def both() -> None:
        bodies = (b'{"mode": "drop"}', b'{"capacity": {"factor": 2.0}}', b'{"fault": {}}')
        await asyncio.gather(*(routes.change(body) for body in bodies))

    asyncio.run(both())
    assert manager.config() == merge(START, {"mode": "drop", "capacity": {"factor": 2.0}})


@pytest.mark.parametrize(
    ("mode", "without", "told"),
    [
        ("replicate", without_replicas, "has no memory for copies of experts"),
        ("downgrade", without_slots, "has no memory for low-precision weights"),
    ],
)
def test_a_lever_that_the_start_went_without_is_refused_by_name(
    manager: Manager, mode: str, without: Callable[[Config], Config], told: str
) -> None:
    ready = as_started(merge(START, {mode: {"ready": True, "slots": 2}}))
    manager.states[0]["moelb"]["config"] = msgspec.to_builtins(without(ready))
    code, answer = change(Routes(manager, ready), {"mode": mode})
    assert code == 400
    assert told in answer["error"]
    assert manager.sent == []


def test_the_kill_switch_is_mode_none_and_keeps_the_rest(
    routes: Routes, manager: Manager
) -> None:
    change(routes, {"mode": "expand", "capacity": {"factor": 1.5}})
    assert change(routes, {"kill": True})[0] == 200
    assert manager.config() == merge(START, {"mode": "none", "capacity": {"factor": 1.5}})


BAD_BODIES: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not UTF-8": (b'{"mode\xff": 1}', "not valid JSON"),
    "too deep": (b'{"a":' * 100_000, "not valid JSON"),
    "infinite": (b'{"capacity": {"factor": 1e999}}', "not valid JSON"),
    "NaN": (b'{"capacity": {"factor": NaN}}', "not valid JSON"),
    "list": ([], "must be a JSON object"),
    "text": ("drop", "must be a JSON object"),
    "null": (None, "must be a JSON object"),
    "unknown key": ({"modus": "drop"}, "unknown knob 'modus'"),
    "unknown knob": ({"capacity": {"fac": 1}}, "unknown knob 'capacity.fac'"),
    "unknown mode": ({"mode": "bad"}, "mode is 'bad'; use one of none, observe"),
    "mode of a wrong type": ({"mode": 3}, "mode is 3; use one of"),
    "mode an object": ({"mode": {"a": 1}}, "mode is {'a': 1}; use one of"),
    "mode without its memory": ({"mode": "replicate"}, "has no memory for copies of experts"),
    "section of a wrong type": ({"capacity": 5}, "capacity must be an object, found 5"),
    "section null": ({"capacity": None}, "capacity must be an object, found None"),
    "negative factor": ({"capacity": {"factor": -1}}, "capacity.factor is -1: "),
    "factor zero": ({"capacity": {"factor": 0}}, "capacity.factor is 0: "),
    "factor text": ({"capacity": {"factor": "1"}}, "capacity.factor is '1': "),
    "factor beyond the ranks' integers": ({"capacity": {"factor": 1e14}}, "capacity.factor is"),
    "tokens beyond the ranks' integers": (
        {"capacity": {"min_batch_tokens": 1 << 70}},
        "capacity.min_batch_tokens is",
    ),
    "fractional count": (
        {"capacity": {"max_extra_experts": 1.5}},
        "capacity.max_extra_experts is 1.5: ",
    ),
    "truth as a number": ({"capacity": {"factor": True}}, "capacity.factor is True: "),
    "number as truth": ({"capacity": {"renormalise": 1}}, "capacity.renormalise is 1: "),
    "budget above one": (
        {"controller": {"quality_budget": 1.01}},
        "controller.quality_budget is 1.01: ",
    ),
    "kill of a wrong type": ({"kill": "no"}, "kill is 'no'; use true"),
    "kill false": ({"kill": False}, "kill is False; use true"),
    "one good and one bad": ({"mode": "drop", "capacity": {"rule": "x"}}, "capacity.rule is 'x'"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_by_name_and_changes_nothing(
    routes: Routes, manager: Manager, name: str
) -> None:
    body, message = BAD_BODIES[name]
    code, answer = change(routes, body)
    assert code == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert manager.sent == []
    change(routes, {})
    assert manager.config() == START


def test_a_change_that_a_rank_refuses_is_an_error_and_is_not_built_upon(
    routes: Routes, manager: Manager
) -> None:
    manager.answers = [True, False]
    code, answer = change(routes, {"mode": "drop"})
    assert code == 503
    assert "not every rank took the change" in answer["error"]
    manager.answers = [True, True]
    change(routes, {"capacity": {"factor": 3.0}})
    assert manager.config() == merge(START, {"capacity": {"factor": 3.0}})


@pytest.mark.parametrize("body", [{"mode": "drop"}, {"kill": True}])
def test_a_dead_controller_refuses_every_change_and_says_so(
    routes: Routes, manager: Manager, body: Any
) -> None:
    manager.states[0]["moelb"]["controller"]["state"] = "dead"
    assert change(routes, body) == (503, {"error": DEAD})
    assert manager.sent == []


def test_a_hung_controller_still_takes_changes(routes: Routes, manager: Manager) -> None:
    manager.states[0]["moelb"]["controller"]["state"] = "hung"
    assert change(routes, {"fault": {"controller": "none"}})[0] == 200
    assert len(manager.sent) == 1


def test_the_status_is_the_leaders_with_the_number_of_ranks(
    routes: Routes, manager: Manager
) -> None:
    status = asyncio.run(routes.status())
    assert status == {"controller": {"state": "running"}, "rank": 0, "ranks_answering": 2}


@pytest.mark.parametrize("states", [[], [{}], [{"moelb": {"controller": {"state": "off"}}}]])
def test_without_a_leader_the_status_says_so_and_changes_are_refused(
    routes: Routes, manager: Manager, states: list[dict[str, Any]]
) -> None:
    manager.states = states
    status = asyncio.run(routes.status())
    assert status["active"] is False
    assert "no rank answers" in status["reason"]
    assert change(routes, {"mode": "drop"})[0] == 503
    assert manager.sent == []


def test_every_knob_can_be_sent_as_sglang_takes_state_updates(routes: Routes) -> None:
    from sglang.srt.managers.io_struct import SetInternalStateReq

    numbers = to_numbers(START)
    request = SetInternalStateReq(server_args=numbers)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(request.server_args))
    assert from_numbers(again, START) == START
    assert list(numbers) == [knob for knob in flat(START) if knob not in START_KNOBS]


def test_a_server_without_slots_refuses_downgrade_by_name_and_with_the_fix(
    routes: Routes, manager: Manager
) -> None:
    code, answer = change(routes, {"mode": "downgrade"})
    assert code == 400
    assert "mode is 'downgrade'" in answer["error"]
    assert "Restart it with --moelb-mode downgrade, or downgrade.ready true" in answer["error"]
    assert manager.sent == []


def test_a_server_with_slots_goes_into_downgrade_and_back(manager: Manager) -> None:
    routes = Routes(manager, merge(Config(), {"mode": "auto", "downgrade": {"ready": True}}))
    for mode in ("none", "downgrade", "observe", "downgrade"):
        code, answer = change(routes, {"mode": mode})
        assert (code, answer["config"]["mode"]) == (200, mode)
        assert answer["config"]["downgrade"]["slots"] == 2


def test_a_server_with_room_for_copies_goes_into_replicate_and_back(manager: Manager) -> None:
    ready = merge(Config(), {"mode": "auto", "replicate": {"ready": True, "slots": 3}})
    routes = Routes(manager, ready)
    for mode in ("none", "replicate", "observe", "replicate"):
        code, answer = change(routes, {"mode": mode})
        assert (code, answer["config"]["mode"]) == (200, mode)
        assert answer["config"]["replicate"]["slots"] == 3
    code, answer = change(routes, {"replicate": {"slots": 4}})
    assert code == 400
    assert "replicate.slots is 4: it decides about memory at start" in answer["error"]
    assert change(routes, {"replicate": {"min_rows": 128}})[0] == 200


@pytest.mark.parametrize(
    "section", [{"slots": 1}, {"format": "nvfp4-emulated"}, {"resident_layers": "all"}]
)
def test_what_is_allocated_at_start_cannot_change_while_serving(
    manager: Manager, section: dict[str, Any]
) -> None:
    routes = Routes(manager, merge(Config(), {"mode": "downgrade"}))
    code, answer = change(routes, {"downgrade": section})
    assert code == 400
    assert f"downgrade.{next(iter(section))} is " in answer["error"]
    assert "restart the server with it" in answer["error"]
    assert manager.sent == []
    assert change(routes, {"downgrade": {"factor": 1.5, "form": "experts"}})[0] == 200
