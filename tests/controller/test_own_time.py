"""Laws of what the controller learns of the levers' own time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.config import Config
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.own_time import RETRY_PASSES, OwnTime, OwnTimes, size_of
from sglang_moelb.types import Lever, Observation, Policy, StepRecord

from .world import SKEWED, TOPOLOGY, config, record


def under(lever: Lever, own_ms: float) -> StepRecord:
    return replace(record(SKEWED, policy=Policy(epoch=1, lever=lever)), balance_ms=own_ms)


def learned(*records: StepRecord) -> OwnTime:
    own = OwnTime()
    for one in records:
        own = own.updated(one)
    return own


def test_a_lever_takes_what_its_passes_take_beyond_those_without_one() -> None:
    own = learned(under(Lever.NONE, 0.5), under(Lever.DROP, 3.5))
    assert own.extra_ms(Lever.DROP) == pytest.approx(3.0)
    assert learned(under(Lever.NONE, 5.0), under(Lever.DROP, 3.5)).extra_ms(Lever.DROP) == 0.0


def test_beside_an_exact_lever_that_is_known_an_unknown_one_takes_as_much() -> None:
    own = learned(under(Lever.NONE, 0.04), under(Lever.REPLICATE, 3.04))
    assert own.extra_ms(Lever.DROP) == own.extra_ms(Lever.REPLICATE) == pytest.approx(3.0)
    assert own.updated(under(Lever.DROP, 1.04)).extra_ms(Lever.DROP) == pytest.approx(1.0)


def test_passes_of_one_size_say_nothing_of_those_of_another() -> None:
    own = OwnTimes().updated(under(Lever.DROP, 3.5), 5000).updated(under(Lever.DROP, 9.5), 60_000)
    sizes = [size_of(num_tokens) for num_tokens in (4097, 60_000, 100)]
    assert [own.extra_ms(Lever.DROP, {size: 2}) for size in sizes] == [7.0, 19.0, 0.0]


@pytest.mark.parametrize("odd_ms", [0.0, -1.0, np.nan, np.inf])
def test_a_time_that_cannot_be_is_ignored(odd_ms: float) -> None:
    own = learned(under(Lever.DROP, 3.5))
    assert own.updated(under(Lever.DROP, odd_ms)) == own


def test_what_is_long_unused_is_tried_again_and_the_first_pass_then_counts_in_full() -> None:
    waiting = [under(Lever.NONE, 0.5)] * RETRY_PASSES
    own = learned(under(Lever.NONE, 0.5), under(Lever.DROP, 3.5), *waiting[:-1])
    assert own.extra_ms(Lever.DROP) == pytest.approx(3.0)
    own = own.updated(waiting[-1])
    assert own.extra_ms(Lever.DROP) == 0.0
    assert own.updated(under(Lever.DROP, 9.5)).extra_ms(Lever.DROP) == pytest.approx(9.0)


def served(settings: Config, own_ms: float, num_passes: int) -> list[Lever]:
    """Levers of equal passes in which each lever takes `own_ms`."""
    controller = Controller(settings, TOPOLOGY)
    levers = []
    for step in range(num_passes):
        one = record(SKEWED, policy=controller.policy, step=step)
        if controller.policy.lever is not Lever.NONE:
            one = replace(one, balance_ms=one.balance_ms + own_ms, step_ms=one.step_ms + own_ms)
        levers.append(controller.step(Observation(record=one, now_s=0.1 * step)).policy.lever)
    return levers


@pytest.mark.parametrize("share", [0.4, 0.6, 2.0])
def test_a_lever_that_takes_more_than_it_saves_is_seldom_tried(share: float) -> None:
    num_passes = 1000
    own_ms = share * record(SKEWED).step_ms
    assert Lever.NONE not in served(config(), 0.0, num_passes)[100:]
    levers = served(config(), own_ms, num_passes)
    num_used = num_passes - levers.count(Lever.NONE)
    assert 0 < num_used < 0.06 * num_passes, "it has to be tried to be known"
