"""Laws of the verdict: its sign is that of what was measured, and it says what it does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.types import (
    Lever,
    LeverScore,
    Observation,
    Policy,
    StepRecord,
    Topology,
    Verdict,
)

from . import h100
from .world import (
    BALANCED,
    DROPPED_MASS,
    JUDGING,
    MILD,
    SKEWED,
    TOPOLOGY,
    judged,
    record,
    score,
    without_times,
)

PASS_S = 0.5  # a sample a pass
LOADS = h100.loads()
TRUE_EFFECT = 0.02


def feed(
    controller: Controller, records: Iterable[StepRecord], pass_s: float = PASS_S, from_s: float = 0
) -> Controller:
    for i, one in enumerate(records):
        controller.step(Observation(record=one, now_s=from_s + pass_s * i))
    return controller


def verdict_of(controller: Controller) -> Verdict:
    verdict = controller.verdict()
    assert verdict is not None
    return verdict


def after(
    config: Config, records: Iterable[StepRecord], topology: Topology = TOPOLOGY
) -> Verdict:
    """The verdict after these passes, a sample each."""
    return verdict_of(feed(Controller(config, topology), records))


def steady(load_E: Sequence[int], num: int = 60, **more: float) -> list[StepRecord]:
    return [record(load_E, step=i, **more) for i in range(num)]  # type: ignore[arg-type]


def on_h100(load: h100.Load, mode: str) -> tuple[Verdict, LeverScore]:
    """The verdict of a server in observe on a load of the benchmark, and the score of `mode`."""
    name, _, factor = mode.partition("@")
    changes = {
        "mode": "observe",
        "capacity": {"factor": float(factor)},
        "controller": {"quality_budget": 1.0},
        "verdict": JUDGING,
    }
    verdict = after(merge(Config(), changes), h100.passes(load, 60), h100.TOPOLOGY)
    return verdict, score(verdict, Lever[name.upper()])


def test_replicate_is_judged_where_there_are_slots_and_recommended_before_a_lossy_lever() -> None:
    load = next(one for one in LOADS if one.skew == 2.0 and one.tokens_per_rank >= 16384)
    for num_slots, expected in ((8, Lever.REPLICATE), (0, Lever.NONE)):
        changes = {"mode": "observe", "replicate": {"slots": num_slots}, "verdict": JUDGING}
        verdict = after(merge(Config(), changes), h100.passes(load, 60), h100.TOPOLOGY)
        levers = [one.lever for one in verdict.scores]
        assert (Lever.REPLICATE in levers) is bool(num_slots)
        assert verdict.lever is expected, verdict.text
    generous = {**changes, "replicate": {"slots": 8}, "controller": {"quality_budget": 1.0}}
    verdict = after(merge(Config(), generous), h100.passes(load, 60), h100.TOPOLOGY)
    assert verdict.text.startswith("turn on replicate: expected gain ")
    assert verdict.text.endswith("of prefill time, exact")


def test_the_benchmark_has_effects_of_both_signs_to_be_right_about() -> None:
    effects = [load.effect(mode) for load in LOADS for mode in load.levers]
    assert sum(effect > TRUE_EFFECT for effect in effects) >= 8
    assert sum(effect < -TRUE_EFFECT for effect in effects) >= 3


@pytest.mark.parametrize("load", LOADS, ids=lambda load: f"{load.commit}-{load.label}-{load.skew}")
def test_the_sign_is_right_on_every_measured_load_whose_effect_is_over_two_per_cent(
    load: h100.Load,
) -> None:
    for mode in load.levers:
        effect = load.effect(mode)
        verdict, one = on_h100(load, mode)
        if abs(effect) > TRUE_EFFECT:
            assert np.sign(one.gain) == np.sign(effect), (mode, effect, one)
        followed = f"{verdict.lever.name.lower()}@{mode.partition('@')[2]}"
        if verdict.lever is Lever.NONE:
            assert effect <= TRUE_EFFECT, verdict.text
        elif followed in load.levers:
            assert load.effect(followed) >= 0.0, verdict.text


def test_a_balanced_load_is_left_alone() -> None:
    for load_E in (BALANCED, MILD):
        verdict = after(judged(), steady(load_E))
        assert verdict.lever is Lever.NONE
        assert verdict.text.startswith("leave it off, because the best lever, ")
        assert verdict.text.endswith(" of prefill time, not above min_gain 2.0 %")


def test_a_skewed_load_is_worth_a_lever() -> None:
    verdict = after(judged(), steady(SKEWED))
    assert verdict.text.startswith(f"turn on {verdict.lever.name.lower()}: expected gain ")
    drop = score(verdict, Lever.DROP)
    assert (drop.gain_low, drop.gain, drop.gain_high) == pytest.approx((0.229, 0.238, 0.242), 0.01)
    assert drop.lost_mass_share == pytest.approx(0.14375)


def test_passes_too_small_for_a_lever_are_no_reason_for_one() -> None:
    config = merge(judged(), {"capacity": {"min_batch_tokens": 10_000}})
    verdict = after(config, steady(SKEWED))
    assert verdict.lever is Lever.NONE
    assert verdict.text == (
        "leave it off, because not enough: no prefill passes of at least 10000 tokens seen yet"
    )


def test_short_passes_do_not_pay_for_what_a_lever_takes_itself() -> None:
    # The same skew as that which is worth a lever in large passes. Counting takes longer, because
    # the device waits for the host.
    waiting = [replace(one, balance_ms=0.6) for one in steady([n // 10 for n in SKEWED])]
    verdict = after(judged(), waiting)
    assert verdict.lever is Lever.NONE
    assert score(verdict, Lever.DROP).gain < 0.0


def test_few_passes_are_not_enough_and_both_numbers_are_told() -> None:
    verdict = after(judged(), steady(SKEWED, 20))
    assert verdict.lever is Lever.NONE
    assert verdict.scores == ()
    assert (verdict.num_passes, verdict.num_passes_needed) == (20, 47)
    assert verdict.reason == "not enough: 20 of 47 passes of at least 0 tokens"


@pytest.mark.parametrize("mode", ["observe", "none", "drop", "auto"])
def test_without_times_nothing_is_recommended_in_any_mode(mode: str) -> None:
    config = judged(mode)
    verdict = after(config, [without_times(one) for one in steady(SKEWED)])
    assert verdict.lever is Lever.NONE
    assert verdict.reason == "not enough: no time of the experts measured yet"
    as_it_is = {"drop": "leave it as it is", "auto": "leave it to auto"}.get(mode, "leave it off")
    assert verdict.text == f"{as_it_is}, because {verdict.reason}"


def test_what_a_lever_takes_itself_is_subtracted_once_it_was_measured() -> None:
    def passes(balance_ms: float) -> list[StepRecord]:
        policy = Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25)
        used = replace(record(SKEWED, policy=policy), balance_ms=balance_ms)
        return [*steady(SKEWED, 30), *[used] * 8, *steady(SKEWED, 60)]

    config = judged(quality_budget=1.0)
    cheap, costly = (score(after(config, passes(ms)), Lever.DROP) for ms in (0.0201, 4.0201))
    assert cheap.measured
    assert cheap.gain - costly.gain == pytest.approx(4.0 / 20.6, rel=0.03)
    assert after(config, passes(8.0)).lever is not Lever.DROP


def test_a_compile_in_the_first_passes_of_a_lever_is_not_its_own_time() -> None:
    policy = Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25)
    used = record(SKEWED, policy=policy)
    first = replace(used, balance_ms=8000.0, step_ms=used.step_ms + 8000.0)
    config = judged(quality_budget=1.0)
    found = after(config, [*steady(SKEWED, 30), first, *[used] * 8, *steady(SKEWED, 60)])
    expected = after(config, [*steady(SKEWED, 30), *[used] * 9, *steady(SKEWED, 60)])
    gains = [score(one, Lever.DROP).gain for one in (found, expected)]
    assert gains[0] == pytest.approx(gains[1], rel=0.01)


def test_every_lever_that_is_forecast_is_scored() -> None:
    without_slots = merge(judged(), {"downgrade": {"slots": 0}})
    for config, num_levers in ((judged(), 3), (without_slots, 2)):
        controller = feed(Controller(config, TOPOLOGY), steady(SKEWED))
        last = controller.step(Observation(record=record(SKEWED), now_s=99))
        forecast = {one.lever for one in last.estimate.forecasts}
        assert len(forecast) == num_levers
        assert {one.lever for one in verdict_of(controller).scores} == forecast


def test_dropped_mass_is_what_the_passes_would_have_lost() -> None:
    policy = Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25)
    used = [record(SKEWED, policy=policy) for _ in range(40)]
    verdict = after(judged(quality_budget=1.0), [*used, *steady(SKEWED)])
    dropped_share = 2300 / 8000
    lost_share = score(verdict, Lever.DROP).lost_mass_share
    assert lost_share == pytest.approx(DROPPED_MASS * dropped_share, rel=0.05)
