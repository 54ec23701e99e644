"""Laws of the whole loop: record -> load -> forecast -> decide -> policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.types import Effects, Lever, Observation, Topology

from .world import (
    BALANCED,
    FIXED_MS,
    MILD,
    MS_PER_ROW,
    SKEWED,
    TOPOLOGY,
    config,
    in_mode,
    num_moves,
    observe,
    record,
    serve,
    without_times,
)

ONE_EXPERT = (8000, 0, 0, 0, 0, 0, 0, 0)
# Under a steady skew both levers spare the slowest rank the same, and expansion loses less.
CHOSEN = Lever.EXPAND


def served(settings: Config, passes: Sequence[Sequence[int]]) -> list[Effects]:
    return serve(Controller(settings, TOPOLOGY), passes)


def levers(effects: list[Effects]) -> set[Lever]:
    return {e.policy.lever for e in effects}


def pairs(effects: list[Effects]) -> list[tuple[Effects, Effects]]:
    return list(pairwise(effects))


def test_constant_load_is_a_fixed_point() -> None:
    settled = served(config(), [SKEWED] * 100)[40:]
    first, last = settled[0], settled[-1]
    assert {e.policy for e in settled} == {first.policy}
    assert last.estimate.balance_L.tolist() == first.estimate.balance_L.tolist()
    assert last.estimate.forecasts[0].gain == pytest.approx(first.estimate.forecasts[0].gain)


def test_scaling_the_load_keeps_the_choice_and_scales_the_share_of_the_experts() -> None:
    small, large = (
        observe(Controller(config(), TOPOLOGY), [record(SKEWED, scale=s) for _ in range(8)])[-1]
        for s in (1, 4)
    )
    assert (large.estimate.balance_L == small.estimate.balance_L).all()
    assert large.policy == replace(small.policy, reason=large.policy.reason)
    assert large.estimate.moe_share > small.estimate.moe_share
    assert large.decision.expected_gain > small.decision.expected_gain


def test_the_cost_is_learned_from_the_passes() -> None:
    last = served(config(), [SKEWED, BALANCED, MILD] * 8)[-1].estimate
    assert (last.fixed_ms, last.ms_per_row) == pytest.approx((FIXED_MS, MS_PER_ROW))


def test_balanced_load_is_left_alone_with_a_reason() -> None:
    effects = served(config(), [BALANCED] * 50)
    assert levers(effects) == {Lever.NONE}
    assert effects[-1].policy.reason.startswith("balanced: ")
    assert levers(served(config(), [MILD] * 50)) == {Lever.NONE}


def test_skewed_load_is_acted_on_within_two_passes() -> None:
    effects = served(config(), [SKEWED] * 10)
    assert [e.policy.lever for e in effects[:3]] == [Lever.NONE, CHOSEN, CHOSEN]
    assert effects[0].policy.reason.startswith("confidence 0.33 after 1 passes")


def num_returns(effects: list[Effects]) -> int:
    """How often a lever was taken up again that had been left."""
    held = [a.policy.lever for a, b in pairs(effects) if a.policy.lever != b.policy.lever]
    held.append(effects[-1].policy.lever)
    return len(held) - len(set(held))


@pytest.mark.parametrize("period", [2, 4, 8, 16])
@pytest.mark.parametrize("low", [MILD, BALANCED])
def test_a_fast_square_wave_does_not_make_the_lever_flap(period: int, low: tuple[int, ...]) -> None:
    wave = [SKEWED if i % period < period // 2 else low for i in range(200)]
    effects = served(config(), wave)
    assert num_returns(effects) == 0
    assert num_moves(effects[32:]) == 0
    assert effects[-1].policy.lever != Lever.NONE


@pytest.mark.parametrize("gain", [0.01, 0.05, 0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.15])
def test_a_square_wave_about_the_least_gain_does_not_make_the_lever_flap(gain: float) -> None:
    wave = [SKEWED if i % 10 < 5 else MILD for i in range(200)]
    effects = served(config(min_gain=gain), wave)
    assert num_moves(effects[32:]) <= 1
    assert num_returns(effects[32:]) == 0


def test_a_slow_square_wave_is_followed() -> None:
    wave = [SKEWED if i < 100 else BALANCED for i in range(200)]
    effects = served(config(), wave)
    assert [effects[i].policy.lever for i in (0, 99, 199)] == [Lever.NONE, CHOSEN, Lever.NONE]
    assert num_moves(effects) <= 3


def test_hysteresis_keeps_a_lever_between_the_two_thresholds() -> None:
    for mode, lever in (("observe", Lever.NONE), ("auto", CHOSEN)):
        controller = Controller(
            in_mode(mode, min_gain=1.0 if mode == "observe" else 0.02), TOPOLOGY
        )
        gains = [f.gain for f in serve(controller, [SKEWED] * 8)[-1].estimate.forecasts]
        between = config(min_gain=max(gains) - 0.005, switch_margin=0.01)
        assert controller.reconfigure(between).lever == lever


def test_small_text_only_batches_change_nothing() -> None:
    settings = merge(config(), {"capacity": {"min_batch_tokens": 4000}})
    controller = Controller(settings, TOPOLOGY)
    before = serve(controller, [SKEWED] * 8)[-1]
    small = record(tuple(n // 2 for n in BALANCED), vision=0.0)
    after = observe(controller, [small] * 50)[-1]
    assert after.policy == before.policy
    assert after.estimate.num_passes == before.estimate.num_passes
    alone = observe(Controller(settings, TOPOLOGY), [small] * 50)[-1]
    assert alone.policy.reason == "no prefill pass of at least 4000 tokens seen yet"


def test_decode_and_idle_passes_change_nothing() -> None:
    controller = Controller(config(), TOPOLOGY)
    before = serve(controller, [SKEWED] * 8)[-1]
    for phase in ("decode", "idle"):
        assert observe(controller, [record(BALANCED, phase=phase)] * 50)[-1] == before


def test_a_spent_budget_stops_and_resumes() -> None:
    settings = in_mode("drop", quality_budget=0.02, quality_window_passes=16)
    effects = served(settings, [SKEWED] * 64)
    acted = [e.policy.lever == Lever.DROP for e in effects]
    assert True in acted
    assert False in acted
    for before, after in pairs(effects):
        if before.policy.lever == Lever.NONE and after.policy.lever == Lever.DROP:
            assert after.estimate.spent_mass_share < 0.016
        if before.policy.lever == Lever.DROP and after.policy.lever == Lever.NONE:
            assert after.estimate.spent_mass_share > 0.02
            assert after.policy.reason.startswith("quality budget spent: ")


def test_mode_drop_never_exceeds_the_budget_for_more_than_the_window() -> None:
    num_window = 16
    settings = in_mode("drop", quality_budget=0.02, quality_window_passes=num_window)
    over = [e.estimate.spent_mass_share > 0.02 for e in served(settings, [SKEWED] * 200)]
    assert any(over)
    assert not any(all(over[i : i + num_window]) for i in range(200 - num_window))


def test_auto_stays_inside_the_budget_with_a_lever_whose_loss_it_has_learned() -> None:
    effects = served(config(quality_budget=0.1), [SKEWED] * 300)
    assert effects[-1].policy.lever != Lever.NONE
    assert effects[-1].estimate.spent_mass_share <= 0.1


def test_the_epoch_grows_with_every_change_and_with_nothing_else() -> None:
    effects = served(config(), [SKEWED] * 60 + [BALANCED] * 60)
    for before, after in pairs(effects):
        changed = replace(after.policy, epoch=0, reason="") != replace(
            before.policy, epoch=0, reason=""
        )
        assert after.policy.epoch - before.policy.epoch == int(changed)
    assert len({e.policy.reason for e in effects}) > effects[-1].policy.epoch > 1


def test_the_first_epoch_is_the_one_given() -> None:
    assert Controller(config(), TOPOLOGY, epoch=41).policy.epoch == 41


def test_a_mode_named_for_a_lever_holds_from_the_first_pass() -> None:
    for mode, lever in (("drop", Lever.DROP), ("expand", Lever.EXPAND)):
        controller = Controller(in_mode(mode), TOPOLOGY)
        assert (controller.policy.lever, controller.policy.reason) == (lever, f"mode {mode}")


@pytest.mark.parametrize("mode", ["none", "observe"])
def test_modes_none_and_observe_never_use_a_lever(mode: str) -> None:
    effects = served(in_mode(mode), [SKEWED] * 50)
    assert {(e.policy.lever, e.policy.epoch) for e in effects} == {(Lever.NONE, 0)}
    assert effects[-1].estimate.balance_L.tolist() == pytest.approx([2.4, 2.4])


def test_observe_says_what_auto_would_have_chosen() -> None:
    reason = served(in_mode("observe"), [SKEWED] * 8)[-1].policy.reason
    assert reason.startswith("observe only: would choose expand, because keeping expand: ")


def test_extreme_skew_one_rank_and_no_rows_are_survived() -> None:
    assert served(config(quality_budget=1.0), [ONE_EXPERT] * 8)[-1].policy.lever == CHOSEN
    one_rank = Topology(num_layers=2, num_experts=8, num_ranks=1, topk=2)
    alone = [record(SKEWED, topology=one_rank) for _ in range(8)]
    assert observe(Controller(config(), one_rank), alone)[-1].policy.reason.startswith("balanced")
    empty = served(config(), [(0,) * 8] * 8)[-1]
    assert empty.policy.reason == "no prefill pass of at least 0 tokens seen yet"
    rowless = replace(record(BALANCED), rows_LEM=np.zeros_like(record(BALANCED).rows_LEM))
    observe(Controller(config(), TOPOLOGY), [rowless] * 3)


def test_times_that_are_unknown_or_not_finite_never_lead_to_action() -> None:
    nan = replace(record(SKEWED), step_ms=float("nan"), experts_ms_L=np.full(2, np.nan))
    for broken in (without_times(record(SKEWED)), nan):
        last = observe(Controller(config(), TOPOLOGY), [broken] * 8)[-1]
        assert last.policy.lever == Lever.NONE
        assert last.policy.reason.startswith("no time of the experts measured yet")
    mixed = observe(Controller(config(), TOPOLOGY), [nan, record(SKEWED)] * 8)[-1]
    assert mixed.policy.lever == CHOSEN
    assert np.isfinite(mixed.decision.expected_gain)


def test_a_compile_in_the_first_passes_does_not_delay_or_mislead() -> None:
    slow = replace(
        record(SKEWED), step_ms=30_000.0, experts_ms_L=100.0 * record(SKEWED).experts_ms_L
    )
    clean = observe(Controller(config(), TOPOLOGY), [record(SKEWED)] * 8)[-1]
    after = observe(Controller(config(), TOPOLOGY), [slow, slow] + [record(SKEWED)] * 8)[-1]
    assert after.policy.lever == CHOSEN
    assert after.decision.expected_gain == pytest.approx(clean.decision.expected_gain)


def test_passes_in_quick_succession_are_counted_but_not_all_forecast() -> None:
    records = [record(SKEWED, step=i) for i in range(9)]
    often = Controller(config(), TOPOLOGY)
    seldom = Controller(config(), TOPOLOGY)
    estimates = [
        seldom.step(Observation(record=r, now_s=0.02 * i)).estimate for i, r in enumerate(records)
    ]
    for i, r in enumerate(records):
        last = often.step(Observation(record=r, now_s=float(i))).estimate
    assert [e.num_passes for e in estimates] == [1, 1, 1, 1, 1, 6, 6, 6, 6]
    again = seldom.step(Observation(record=records[-1], now_s=1.0)).estimate
    assert again.num_passes == 10
    assert last.num_passes == 9


def test_a_spent_budget_is_acted_on_at_once() -> None:
    limits = {"mode": "drop", "controller": {"interval_ms": 60_000, "quality_budget": 0.01}}
    controller = Controller(merge(Config(), limits), TOPOLOGY)
    first = controller.step(Observation(record=record(SKEWED), now_s=0.0))
    assert first.policy.lever is Lever.DROP
    lossy = replace(
        record(SKEWED, policy=first.policy, step=1), routed_mass=1e6, lost_mass=5e5
    )
    after = controller.step(Observation(record=lossy, now_s=0.001))
    assert after.estimate.spent_mass_share > 0.01
    assert after.policy.lever is Lever.NONE
