"""Laws of the verdict: its sign is that of what was measured, and it says what it does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.config import Config, merge
from sglang_moelb.controller import verdict as judging
from sglang_moelb.controller.batch_means import MIN_SAMPLES
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.scoreboard import Sample
from sglang_moelb.types import (
    Lever,
    LeverScore,
    LoadEstimate,
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
    MILD,
    SKEWED,
    TOPOLOGY,
    in_mode,
    record,
    without_times,
)

JUDGING = {"enabled": True}
PASS_S = 0.5  # a sample a pass
LOADS = h100.loads()
TRUE_EFFECT = 0.02
ESTIMATE = LoadEstimate(
    num_passes=32,
    confidence=0.9,
    balance_L=np.ones(2),
    moe_share=0.5,
    ms_per_row=0.1,
    fixed_ms=0.0,
    spent_mass_share=0.0,
    forecasts=(),
)


def judged(mode: str = "observe", **controller: float) -> Config:
    """The world's configuration, with the verdict."""
    return merge(in_mode(mode, **controller), {"verdict": JUDGING})


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


def score(verdict: Verdict, lever: Lever) -> LeverScore:
    return next(one for one in verdict.scores if one.lever is lever)


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


def test_a_lever_of_which_nothing_is_known_is_taken_to_be_costly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = judging.own_cost(Lever.DROP, Held(), 10)  # type: ignore[arg-type]
    monkeypatch.delitem(judging.ASSUMED, Lever.DROP)
    unknown = judging.own_cost(Lever.DROP, Held(), 10)  # type: ignore[arg-type]
    assert unknown.ms > known.ms
    assert unknown.worst_ms > known.worst_ms


@dataclass(frozen=True)
class Held:
    """A board with these samples and own times by lever."""

    samples: tuple[Sample, ...] = ()
    levers: tuple[Lever, ...] = (Lever.EXPAND, Lever.DROP)
    num_passes: int = 100
    ms: tuple[float, ...] = (0.0,) * len(Lever)

    def own_ms(self, lever: Lever) -> float:
        return self.ms[lever]


def held(
    gains_V: Sequence[float],
    lost_V: Sequence[float],
    low_V: Sequence[float] = (0.0, 0.0),
    **more: Any,
) -> Held:
    """Samples with these gains and losses of expand and drop, of which drop takes 10 % itself.

    Times are such that OwnCost of drop, as assumed, is a tenth of a pass of 100 ms.
    """
    own_ms = judging.own_cost(Lever.DROP, Held(), 1).ms  # type: ignore[arg-type]
    sample = Sample(
        num_passes=2,
        num_small=1,
        num_tokens=8000,
        prefill_ms=20.0 * own_ms,
        spared_ms_V=tuple(20.0 * own_ms * (gain + 0.1) for gain in gains_V),
        lost_share_V=tuple(lost_V),
        low_share_V=tuple(low_V),
    )
    return Held(samples=(sample,) * MIN_SAMPLES, num_passes=2 * MIN_SAMPLES, **more)


def said(board: Held, mode: str = "observe", spent: float = 0.0, **controller: float) -> str:
    """The text of the verdict on a board in a model of one layer."""
    verdict = judging.judge(
        board,  # type: ignore[arg-type]
        estimate=replace(ESTIMATE, spent_mass_share=spent),
        config=judged(mode, **controller),
        num_layers=1,
    )
    return verdict.text


ON = "drop: expected gain 15.0 % [5.0, 20.0] of prefill time, costs 1.0 % of gate mass"
OFF = "the best lever, drop, has an expected gain of 1.0 % [-9.0, 6.0] of prefill time, not above "


def test_the_lines_are_these_in_each_mode() -> None:
    on, off = held((-9.0, 0.15), (0.0, 0.01)), held((-9.0, 0.01), (0.0, 0.01))
    for mode, yes, no in (
        ("none", "turn on", "leave it off"),
        ("observe", "turn on", "leave it off"),
        ("expand", "turn on", "turn it off"),
        ("drop", "keep", "turn it off"),
        ("auto", "keep auto on, best with", "leave it to auto"),
    ):
        assert said(on, mode) == f"{yes} {ON}"
        assert said(off, mode) == f"{no}, because {OFF}min_gain 2.0 %"


def test_the_quality_budget_forbids_with_the_numbers() -> None:
    lossy = held((-9.0, 0.15), (0.0, 0.045))
    costly = ON.replace("1.0 %", "4.5 %")
    assert said(lossy, quality_budget=0.06) == f"turn on {costly}"
    assert said(lossy, quality_budget=0.05) == (
        f"leave it off, because {costly}, but quality_budget 5.0 % allows 4.0 % to start; "
        "raise it or capacity.factor"
    )
    assert said(lossy, quality_budget=0.0) == (
        f"leave it off, because {costly}, but quality_budget is 0, so lossy levers are off; "
        "raise it to allow them"
    )


def test_a_spent_budget_forbids_what_would_fit_into_it() -> None:
    lossy = held((-9.0, 0.15), (0.0, 0.01))
    assert said(lossy, spent=0.2, quality_budget=0.2) == f"turn on {ON}"
    over = said(lossy, spent=0.3, quality_budget=0.2)
    assert over.startswith(f"leave it off, because {ON}, but quality budget spent: 30.0 %")
    exact = held((-9.0, 0.15), (0.0, 0.0))
    assert said(exact, spent=0.3, quality_budget=0.2).endswith(", costs no gate mass")


def test_the_downgrade_budget_forbids_with_the_numbers() -> None:
    low = held((-9.0, 0.15), (0.0, 0.0), (0.0, 0.3))
    cost = "costs no gate mass, computes 30.0 % of rows at low precision"
    gain = f"{ON.partition(', costs')[0]}, {cost}"
    assert said(low) == f"turn on {gain}"
    assert said(low, downgrade_budget=0.3) == (
        f"leave it off, because {gain}, but downgrade_budget 30.0 % allows 24.0 % to start; "
        "raise it or downgrade.factor"
    )


def test_a_gain_that_is_not_sure_is_not_recommended() -> None:
    unsure = (
        "leave it off, because the best lever, drop, has an expected gain of 10.0 % [0.0, 15.0] "
        "of prefill time, which is not surely above min_gain 2.0 %"
    )
    assert said(held((-9.0, 0.1), (0.0, 0.01))) == (
        f"{unsure}; what drop takes itself is assumed until it has been used on this server"
    )


def test_among_levers_that_pay_alike_the_least_lossy_is_chosen() -> None:
    known = (0.1, 0.1001, 0.1001)  # so that expand pays only what it takes beside its clocks
    alike, better = (0.3, 0.2), (0.3, 0.1)
    for gains_V, lost_V, chosen in (
        (alike, (0.03, 0.01), "drop"),
        (alike, (0.01, 0.03), "expand"),
        (better, (0.03, 0.01), "expand"),
    ):
        assert said(held(gains_V, lost_V, ms=known)).startswith(f"turn on {chosen}: ")


share = st.floats(-0.5, 0.9)
lost = st.floats(0.0, 0.5)


@st.composite
def boards(draw: st.DrawFn) -> Held:
    """Samples about a gain and a loss of each lever, with noise."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gains_V, lost_V = draw(st.tuples(share, share)), draw(st.tuples(lost, lost))
    low_V = draw(st.tuples(lost, lost))
    noise, num = draw(st.floats(0.0, 0.2)), draw(st.integers(1, 3 * MIN_SAMPLES))
    num_passes = draw(st.integers(1, 30))
    made = []
    for _ in range(num):
        ms = float(rng.uniform(1.0, 400.0)) * num_passes
        made.append(
            Sample(
                num_passes=num_passes,
                num_small=0,
                num_tokens=ms,
                prefill_ms=ms,
                spared_ms_V=tuple((g + noise * rng.standard_normal()) * ms for g in gains_V),
                lost_share_V=lost_V,
                low_share_V=low_V,
            )
        )
    return Held(samples=tuple(made), num_passes=num * num_passes)


@given(
    board=boards(),
    min_gain=st.floats(0.0, 0.3),
    budget=st.floats(0.0, 0.5),
    spent=st.floats(0.0, 0.5),
    low_budget=st.floats(0.0, 1.0),
    own=st.tuples(*[st.sampled_from([0.0, 0.1, 5.0])] * len(Lever)),
    mode=st.sampled_from(["none", "observe", "drop", "auto"]),
)
def test_no_lever_is_ever_recommended_that_may_not_pay_or_is_over_the_budget(
    board: Held,
    min_gain: float,
    budget: float,
    spent: float,
    low_budget: float,
    own: tuple[float, ...],
    mode: str,
) -> None:
    config = judged(
        mode, min_gain=min_gain, quality_budget=budget, downgrade_budget=low_budget
    )
    verdict = judging.judge(
        replace(board, ms=own),  # type: ignore[arg-type]
        estimate=replace(ESTIMATE, spent_mass_share=spent),
        config=config,
        num_layers=2,
    )
    for one in verdict.scores:
        assert one.gain_low <= one.gain <= one.gain_high
    if verdict.lever is Lever.NONE:
        assert ", because " in verdict.text
        return
    chosen = score(verdict, verdict.lever)
    assert len(board.samples) >= MIN_SAMPLES
    assert chosen.gain_low > min_gain
    assert chosen.lost_mass_share <= budget
    assert chosen.lost_mass_share == 0.0 or spent <= budget
    assert chosen.low_share <= low_budget
    assert f"{chosen.lever.name.lower()}: expected gain " in verdict.text


def test_dropped_mass_is_what_the_passes_would_have_lost() -> None:
    policy = Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25)
    used = [record(SKEWED, policy=policy) for _ in range(40)]
    verdict = after(judged(quality_budget=1.0), [*used, *steady(SKEWED)])
    dropped_share = 2300 / 8000
    lost_share = score(verdict, Lever.DROP).lost_mass_share
    assert lost_share == pytest.approx(DROPPED_MASS * dropped_share, rel=0.05)
