"""Laws of the pass clock: whatever its thread does, the serving thread goes on, in `none`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.controller_thread import MAX_PENDING, ControllerThread, Pending
from sglang_moelb.types import Effects, Lever, Observation, Policy

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # what dies here is meant to
)

SETTINGS = merge(Config(), {"mode": "drop", "controller": {"timeout_ms": 80.0}})
WAIT_S = 5.0


class Scripted:
    """A controller whose policy counts its steps."""

    def __init__(self) -> None:
        self.policy = Policy(epoch=1, lever=Lever.DROP, reason="mode drop")
        self.seen: list[Any] = []
        self.error: Exception | None = None

    def step(self, observation: Observation) -> Effects:
        if self.error:
            raise self.error
        self.seen.append(observation.record)
        self.policy = replace(self.policy, epoch=self.policy.epoch + 1)
        return Effects(policy=self.policy, decision=None, estimate=None)  # type: ignore[arg-type]

    def reconfigure(self, config: Config) -> Policy:
        lever = Lever.NONE if config.mode == "none" else Lever.DROP
        self.policy = replace(self.policy, epoch=self.policy.epoch + 1, lever=lever)
        return self.policy


class World:
    """A running thread, its controller, and what it has published."""

    def __init__(self) -> None:
        self.controller = Scripted()
        self.published: list[Any] = []
        self.thread = ControllerThread(
            self.controller,  # type: ignore[arg-type]
            SETTINGS,
            lambda record, effects: self.published.append(record),
        )

    def submit(self, name: str = "pass") -> None:
        self.thread.submit(Pending(build=lambda: name))  # type: ignore[arg-type, return-value]

    def fault(self, fault: str) -> None:
        self.thread.reconfigure(merge(SETTINGS, {"fault": {"controller": fault}}))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, "did not happen in time"
            time.sleep(0.002)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.fault("none")
    made.thread.stop()


def test_passes_are_stepped_published_and_change_the_policy(world: World) -> None:
    assert world.thread.policy() == Policy(epoch=1, lever=Lever.DROP, reason="mode drop")
    for name in ("first", "second"):
        world.submit(name)
    world.until(lambda: world.published == ["first", "second"])
    world.until(lambda: world.thread.policy().epoch == 3)
    assert world.controller.seen == ["first", "second"]
    assert world.thread.state == "running"
    assert world.thread.num_submitted == 2
    assert world.thread.effects is not None


def test_a_dead_thread_means_none_with_the_reason_at_the_very_next_call(world: World) -> None:
    world.fault("die")
    world.until(lambda: world.thread.state == "dead")
    policy = world.thread.policy()
    assert policy.lever is Lever.NONE
    assert policy.reason == "controller thread is dead: RuntimeError: fault.controller is 'die'"
    world.submit()
    assert world.thread.policy().lever is Lever.NONE


def test_a_controller_that_raises_kills_its_thread_and_shows_its_error(world: World) -> None:
    world.controller.error = ZeroDivisionError("no rows at all")
    world.submit()
    world.until(lambda: world.thread.state == "dead")
    policy = world.thread.policy()
    assert policy.lever is Lever.NONE
    assert policy.reason == "controller thread is dead: ZeroDivisionError: no rows at all"


def test_a_record_that_cannot_be_built_shows_its_error_too(world: World) -> None:
    def build() -> Any:
        raise ValueError("counts of another width")

    world.thread.submit(Pending(build=build))
    world.until(lambda: world.thread.state == "dead")
    assert "counts of another width" in world.thread.policy().reason


def test_a_hung_thread_means_none_after_the_timeout_and_one_further_pass(world: World) -> None:
    world.fault("hang")
    world.submit()
    time.sleep(0.12)
    assert world.thread.policy().lever is Lever.DROP, "nobody has waited for one record alone"
    world.submit()
    assert world.thread.state == "hung"
    policy = world.thread.policy()
    assert (policy.lever, policy.reason) == (Lever.NONE, "controller thread is hung")


def test_two_passes_within_the_timeout_are_no_hang(world: World) -> None:
    world.fault("hang")
    for _ in range(5):
        world.submit()
    assert world.thread.policy().lever is Lever.DROP
    time.sleep(0.12)
    assert world.thread.policy().lever is Lever.NONE


def test_a_thread_that_answers_again_is_used_again(world: World) -> None:
    world.fault("hang")
    for _ in range(3):
        world.submit()
    time.sleep(0.12)
    assert world.thread.policy().lever is Lever.NONE
    world.fault("none")
    world.until(lambda: world.thread.state == "running")
    world.until(lambda: len(world.published) == 3)
    assert world.thread.policy().lever is Lever.DROP


def test_a_slow_build_is_a_hang_as_well_and_ends_when_it_does(world: World) -> None:
    release = threading.Event()

    def build() -> Any:
        release.wait(WAIT_S)
        return "slow"

    world.thread.submit(Pending(build=build))
    world.submit()
    time.sleep(0.12)
    assert world.thread.policy().lever is Lever.NONE
    release.set()
    world.until(lambda: world.thread.policy().lever is Lever.DROP)


def test_reconfiguring_publishes_a_policy_of_a_new_epoch(world: World) -> None:
    world.thread.reconfigure(merge(SETTINGS, {"mode": "none"}))
    world.until(lambda: world.thread.policy().lever is Lever.NONE)
    assert world.thread.policy().epoch == 2
    world.thread.reconfigure(SETTINGS)
    world.until(lambda: world.thread.policy().lever is Lever.DROP)
    assert world.thread.policy().epoch == 3


def test_the_serving_thread_never_waits_and_pending_passes_are_bounded(world: World) -> None:
    world.fault("hang")
    spent_s = []
    for _ in range(3 * MAX_PENDING):
        begun_s = time.perf_counter()
        world.submit()
        world.thread.policy()
        spent_s.append(time.perf_counter() - begun_s)
    # The slowest percent is left out: a busy machine may take the core away from this thread.
    assert sorted(spent_s)[len(spent_s) * 99 // 100] < 0.005
    assert world.thread.num_submitted <= MAX_PENDING + 2
    time.sleep(0.1)
    assert world.thread.policy().lever is Lever.NONE
    world.fault("none")
    world.until(lambda: len(world.published) == world.thread.num_submitted)
    assert world.thread.state == "running"


def test_a_change_of_state_is_told_once(world: World) -> None:
    states: list[str] = []
    world.thread.on_state = states.append
    world.fault("hang")
    for _ in range(3):
        world.submit()
    time.sleep(0.12)
    for _ in range(4):
        world.thread.policy()
    world.fault("none")
    world.until(lambda: world.thread.state == "running")
    world.thread.policy()
    world.fault("die")
    world.until(lambda: world.thread.state == "dead")
    for _ in range(2):
        world.thread.policy()
    assert states == ["hung", "running", "dead"]


def test_stopping_ends_the_thread_even_while_it_hangs() -> None:
    world = World()
    world.fault("hang")
    world.submit()
    begun_s = time.monotonic()
    world.thread.stop()
    assert time.monotonic() - begun_s < 1.0
    assert world.thread.state == "dead"
