"""Laws of the projections and forecasts. Shape letters: E logical experts, L MoE layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sglang_moelb.controller import cost, load
from sglang_moelb.controller.forecast import Projection, forecast, project
from sglang_moelb.controller.own_time import OwnTime, OwnTimes, size_of
from sglang_moelb.controller.quality import LossModel
from sglang_moelb.types import (
    Level,
    Lever,
    LeverForecast,
    Policy,
    Preference,
    Rule,
    Scope,
    StepRecord,
)

from .world import BALANCED, FIXED_MS, MS_PER_ROW, SKEWED, TOPOLOGY, record

NOTHING_KNOWN = OwnTimes()
ONE_EXPERT = (8000, 0, 0, 0, 0, 0, 0, 0)


def projected(one: StepRecord, **knobs: Any) -> dict[Lever, Projection]:
    capacity = replace(Policy(epoch=0, capacity_factor=1.25), **knobs)
    projections = project(load.load_of(one, TOPOLOGY), TOPOLOGY, capacity)
    return {p.lever: p for p in projections}


def forecasts(
    passes: list[StepRecord], capacity: Policy, own: OwnTimes = NOTHING_KNOWN
) -> dict[Lever, LeverForecast]:
    loads = [load.load_of(one, TOPOLOGY) for one in passes]
    model = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
    made = forecast(
        loads,
        [project(one, TOPOLOGY, capacity) for one in loads],
        cost=model,
        times=cost.step_times(loads, model),
        loss=LossModel(),
        own=own,
        capacity=capacity,
    )
    return {f.lever: f for f in made}


def bare_ms(one: StepRecord) -> float:
    """The step without our own time."""
    return one.step_ms - one.balance_ms


def test_drop_at_expert_level_keeps_what_fits_each_expert() -> None:
    drop = projected(record(SKEWED), level=Level.EXPERT)[Lever.DROP]
    kept_E = [min(n, 1250) for n in SKEWED]
    assert drop.max_rows_L.tolist() == [2500, 2500]
    assert drop.dropped_share == pytest.approx((8000 - sum(kept_E)) / 8000)


def test_drop_at_device_level_keeps_what_fits_each_rank() -> None:
    drop = projected(record(SKEWED))[Lever.DROP]
    assert drop.max_rows_L.tolist() == [2500, 2500]
    assert drop.dropped_share == pytest.approx(2300 / 8000)
    assert drop.balance == pytest.approx(2500 / ((2500 + 1200 + 1000 + 1000) / 4))


def test_a_projection_of_drop_is_what_the_lever_then_leaves() -> None:
    policy = Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25)
    left_L = record(SKEWED, policy=policy).rows_after_LR.max(axis=1)
    assert projected(record(SKEWED))[Lever.DROP].max_rows_L.tolist() == left_L.tolist()


def test_all_rows_on_one_expert_are_cut_to_one_capacity() -> None:
    for level, capacity in ((Level.EXPERT, 1250), (Level.DEVICE, 2500)):
        drop = projected(record(ONE_EXPERT), level=level)[Lever.DROP]
        assert drop.max_rows_L.tolist() == [capacity] * 2
        assert drop.dropped_share == pytest.approx(1 - capacity / 8000)


def test_scope_source_is_forecast_as_global() -> None:
    one = record(SKEWED)
    by_scope = [projected(one, scope=scope)[Lever.DROP].max_rows_L.tolist() for scope in Scope]
    assert by_scope[0] == by_scope[1]


def test_expand_fills_to_capacity_with_rows_of_the_ranks_own_tokens() -> None:
    expand = projected(record(SKEWED), level=Level.EXPERT)[Lever.EXPAND]
    # ranks 1 to 3 have 1000 tokens each: an expert takes at most so many rows, up to 1250
    assert expand.max_rows_L.tolist() == [2500, 2500]
    assert expand.balance == pytest.approx(1.0)


def test_expand_is_limited_by_extra_experts_a_token_and_by_local_tokens() -> None:
    one = record(SKEWED)
    limited = projected(one, max_extra_experts=1)[Lever.EXPAND]
    # device level: rank rows 4800 1200 1000 1000, capacity 2500, 1000 tokens a rank
    assert limited.balance == pytest.approx(2500 / ((2500 + 2200 + 2000 + 2000) / 4))
    alone = replace(one, num_tokens_R=np.array([4000, 0, 0, 0]))
    assert projected(alone)[Lever.EXPAND].balance == projected(alone)[Lever.DROP].balance


def test_expansion_of_a_balanced_load_costs_time() -> None:
    both = forecasts([record(BALANCED)] * 3, Policy(epoch=0, capacity_factor=1.25))
    assert both[Lever.DROP].gain == 0.0
    assert both[Lever.EXPAND].gain == pytest.approx(
        -2 * 500 * MS_PER_ROW / bare_ms(record(BALANCED))
    )


def test_the_gain_is_the_share_of_the_step_that_the_slowest_rank_is_spared() -> None:
    one = record(SKEWED)
    gain = forecasts([one] * 2, Policy(epoch=0, capacity_factor=1.25))[Lever.DROP].gain
    assert gain == pytest.approx(2 * (4800 - 2500) * MS_PER_ROW / bare_ms(one))
    dropped = record(SKEWED, policy=Policy(epoch=0, lever=Lever.DROP, capacity_factor=1.25))
    assert 1 - bare_ms(dropped) / bare_ms(one) == pytest.approx(gain)


def test_lost_mass_is_half_for_the_lowest_scores_whole_for_blind_cuts_and_less_with_expansion() -> (
    None
):
    capacity = Policy(epoch=0, capacity_factor=1.25)
    score = forecasts([record(SKEWED)], capacity)
    dropped_share = 2300 / 8000
    assert score[Lever.DROP].lost_mass_share == pytest.approx(0.5 * dropped_share)
    assert score[Lever.EXPAND].lost_mass_share == pytest.approx(0.25 * dropped_share)


def test_protected_tokens_are_kept_beyond_capacity() -> None:
    one = record(SKEWED)
    all_protected = replace(one, num_protected_tokens_R=one.num_tokens_R)
    assert projected(all_protected)[Lever.DROP].dropped_share == 0.0
    most = replace(one, num_protected_tokens_R=one.num_tokens_R * 3 // 4)
    assert projected(most)[Lever.DROP].max_rows_L.tolist() == [3600, 3600]


def test_vision_rows_weigh_half_under_macs_so_the_same_capacity_holds_more_of_them() -> None:
    macs = {"rule": Rule.MACS, "macs_rho": 0.0}
    for vision, kept in ((0.0, 2500), (1.0, 4800)):
        one = record(SKEWED, vision=vision)
        assert projected(one, **macs)[Lever.DROP].max_rows_L.tolist() == [kept] * 2
    assert projected(record(SKEWED, vision=1.0))[Lever.DROP].max_rows_L.tolist() == [2500] * 2


def test_under_macs_cutting_vision_first_costs_more_rows() -> None:
    one = record(SKEWED, vision=0.5)
    macs = {"rule": Rule.MACS, "macs_rho": 0.0}
    shares = [
        projected(one, preference=preference, **macs)[Lever.DROP].dropped_share
        for preference in (Preference.TEXT_FIRST, Preference.UNIFORM, Preference.IMAGE_FIRST)
    ]
    # amounts of rank 0: 2400 text and 1200 vision against 2500, so 1100 must go
    assert shares == pytest.approx([1100 / 8000, 1468 / 8000, 2200 / 8000], abs=2e-4)


def test_macs_gives_vision_experts_more_room_in_a_vision_heavy_pass() -> None:
    rows_E = np.array(SKEWED)
    vision_E = np.where(np.arange(8) < 2, rows_E, 0)
    mixed = replace(
        record(SKEWED),
        rows_LEM=np.tile(np.stack([rows_E - vision_E, vision_E], axis=1), (2, 1, 1)),
    )
    # 4800 vision rows at half weight against 3200 of text: R_v is 3/7, under a half
    less, same = (
        projected(mixed, rule=Rule.MACS, macs_rho=rho, capacity_factor=0.5)[Lever.DROP]
        for rho in (1.0, 0.0)
    )
    assert less.max_rows_L[0] == int(same.max_rows_L[0] * (1 - 0.5 / 7))


def test_no_rows_and_no_passes_forecast_nothing() -> None:
    empty = replace(record(BALANCED), rows_LEM=np.zeros_like(record(BALANCED).rows_LEM))
    for lever, projection in projected(empty).items():
        assert projection.dropped_share == 0.0, lever
        assert projection.max_rows_L.tolist() == [0, 0]
    assert forecasts([], Policy(epoch=0)) == {}


def test_what_a_lever_takes_itself_is_taken_from_its_gain() -> None:
    policy = Policy(epoch=0, capacity_factor=1.25)
    passes = [record(SKEWED)] * 3
    free = forecasts(passes, policy)
    size = size_of(int(passes[0].num_tokens_R.sum()))
    own = OwnTimes(by_size={size: OwnTime(ms=(1.0, 1.0, 3.0, 0.0, 0.0))})
    paid = forecasts(passes, policy, own)
    assert paid[Lever.EXPAND] == free[Lever.EXPAND]
    expected = free[Lever.DROP].gain - 2.0 / bare_ms(passes[0])
    assert paid[Lever.DROP].gain == pytest.approx(expected)
