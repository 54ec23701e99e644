"""Mode auto under changing loads: about as fast as the best single mode of each phase, and exact
where an exact lever suffices.

The best single mode is the fastest of those whose lever, acting in every pass of the phase, stays
inside its budget. Time is the cost model's, see `schedule`.

Shape letters: P phases.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.types import Lever

from .schedule import PHASES, TINY, Phase, Server, in_mode_ms

MODES = ("none", "expand", "drop", "downgrade", "replicate")
GOAL = 0.98
ENOUGH = '{"mode": "auto"}'
FEW_SLOTS = '{"mode": "auto", "replicate": {"slots": 1}}'
GENEROUS = (
    '{"mode": "auto", "controller": {"quality_budget": 0.5}, "capacity": {"factor": 1.0}}'
)
NO_SLOTS = '{"mode": "auto", "replicate": {"slots": 0}}'


def config_of(text: str) -> Config:
    import msgspec

    return merge(Config(), msgspec.json.decode(text))


@lru_cache
def auto(text: str, exposed_ms: float = 0.0) -> Server:
    return Server(config=config_of(text), exposed_ms=exposed_ms).run(PHASES)


def phase_named(name: str) -> int:
    return [phase.name for phase in PHASES].index(name)


def levers_in(server: Server, name: str) -> set[Lever]:
    return set(server.levers_P[phase_named(name)])


@pytest.mark.parametrize(
    ("text", "exposed_ms"),
    [(ENOUGH, 0.0), (ENOUGH, 0.3), (FEW_SLOTS, 0.0), (GENEROUS, 0.0), (NO_SLOTS, 0.0)],
)
def test_in_every_phase_auto_is_about_as_fast_as_the_best_single_mode(
    text: str, exposed_ms: float
) -> None:
    server, config = auto(text, exposed_ms), config_of(text)
    modes = MODES if config.replicate.slots else MODES[:-1]
    for phase, took_ms in zip(PHASES, server.ms_P, strict=True):
        ms = {mode: in_mode_ms(config, mode, phase, exposed_ms=exposed_ms) for mode in modes}
        best = min(ms, key=lambda mode: ms[mode])
        assert ms[best] >= GOAL * took_ms, (phase.name, best, ms[best] / took_ms)


@pytest.mark.parametrize(("text", "exposed_ms"), [(ENOUGH, 0.0), (ENOUGH, 0.3), (GENEROUS, 0.0)])
def test_no_lossy_lever_acts_where_the_exact_one_suffices(text: str, exposed_ms: float) -> None:
    for name in ("skewed", "vision-heavy", "text-only"):
        assert levers_in(auto(text, exposed_ms), name) <= {Lever.NONE, Lever.REPLICATE}, name


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (ENOUGH, "skewed", Lever.REPLICATE),
        (ENOUGH, "vision-heavy", Lever.REPLICATE),
        (ENOUGH, "text-only", Lever.REPLICATE),
        (ENOUGH, "balanced", Lever.NONE),
        (ENOUGH, "tiny batches", Lever.NONE),
        (FEW_SLOTS, "vision-heavy", Lever.DOWNGRADE),
        (FEW_SLOTS, "text-only", Lever.REPLICATE),
        (NO_SLOTS, "vision-heavy", Lever.DOWNGRADE),
        (GENEROUS, "skewed", Lever.REPLICATE),
    ],
)
def test_the_lever_that_a_phase_calls_for_acts_in_nine_of_ten_of_its_passes(
    text: str, name: str, expected: Lever
) -> None:
    levers = auto(text).levers_P[phase_named(name)]
    assert levers.count(expected) >= 0.9 * len(levers)


def test_without_slots_nothing_is_copied_nor_forecast() -> None:
    server = auto(NO_SLOTS)
    assert all(Lever.REPLICATE not in levers for levers in server.levers_P)


def test_a_lever_that_begins_to_lose_time_stops_within_a_few_passes() -> None:
    phases = (Phase(name="skewed", skew=2.0, num_passes=60), PHASES[phase_named("tiny batches")])
    server = Server(config=config_of(ENOUGH)).run(phases)
    assert server.levers_P[0][-1] is Lever.REPLICATE
    assert server.levers_P[1][:8].count(Lever.REPLICATE) <= 5
    assert set(server.levers_P[1][8:]) == {Lever.NONE}
    assert "replicate takes more time than it saves" in " ".join(server.reasons_P[1][:8])


TINY_FIRST = (
    Phase(name="skewed", skew=2.0, num_passes=40),  # where replicate's own time is learned
    Phase(name="tiny batches", tokens=TINY, skew=2.0, num_passes=40),
)


@pytest.mark.parametrize(
    "before", [(Phase(name="balanced", num_passes=40),), TINY_FIRST], ids=["balanced", "tiny"]
)
@pytest.mark.parametrize("skew", [1.5, 2.0, 3.0])
def test_a_skew_that_comes_is_acted_on_within_a_few_passes(
    before: tuple[Phase, ...], skew: float
) -> None:
    phases = (*before, Phase(name="now", skew=skew, num_passes=40))
    server = Server(config=config_of(ENOUGH)).run(phases)
    assert server.levers_P[-2][-1] is Lever.NONE
    first = server.levers_P[-1].index(Lever.REPLICATE)
    assert first <= 5
    assert set(server.levers_P[-1][first:]) == {Lever.REPLICATE}
