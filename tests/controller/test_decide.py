"""Laws of the choice of a lever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.decide import Standing, decide
from sglang_moelb.types import Decision, Lever, LeverForecast, LoadEstimate

from .world import config, in_mode

CONFIG = config(quality_budget=0.02, min_gain=0.02, switch_margin=0.01, min_dwell_passes=4)


def estimate(
    *,
    drop: tuple[float, float] = (0.0, 0.0),
    expand: tuple[float, float] = (0.0, 0.0),
    replicate: float | None = None,
    **known: Any,
) -> LoadEstimate:
    """An estimate in which a lever has (gain, lost mass share), and the exact one a gain."""
    base = LoadEstimate(
        num_passes=32,
        confidence=0.9,
        balance_L=np.array([2.0, 3.0]),
        moe_share=0.5,
        ms_per_row=0.001,
        fixed_ms=0.5,
        spent_mass_share=0.0,
        forecasts=tuple(
            LeverForecast(lever=lever, balance=1.2, gain=gain, lost_mass_share=lost)
            for lever, (gain, lost) in ((Lever.EXPAND, expand), (Lever.DROP, drop))
        ),
    )
    if replicate is not None:
        exact = LeverForecast(
            lever=Lever.REPLICATE, balance=1.0, gain=replicate, lost_mass_share=0.0
        )
        base = replace(base, forecasts=(*base.forecasts, exact))
    return replace(base, **known)


def decided(
    seen: LoadEstimate, standing: Standing | None = None, settings: Config = CONFIG
) -> Decision:
    return decide(seen, settings, standing or Standing())[0]


def holding(lever: Lever, dwell_passes: int = 100) -> Standing:
    return Standing(lever=lever, dwell_passes=dwell_passes)


def test_a_gain_inside_the_budget_is_taken_and_its_reason_gives_both() -> None:
    decision = decided(estimate(drop=(0.12, 0.011)))
    assert decision.lever == Lever.DROP
    assert decision.reason == "drop saves 12.0 % of a step and loses 1.1 % of gate mass"
    assert (decision.expected_gain, decision.expected_lost_mass_share) == (0.12, 0.011)


def test_a_gain_below_min_gain_is_left_alone() -> None:
    decision = decided(estimate(drop=(0.008, 0.0), expand=(-0.1, 0.0)))
    assert decision.lever == Lever.NONE
    assert decision.reason == (
        "balanced: best lever drop would save 0.8 % of a step, below min_gain 2.0 %"
    )


def test_a_gain_that_balance_could_not_have_brought_does_not_count() -> None:
    one_rank = estimate(drop=(0.3, 0.001), balance_L=np.array([1.0, 1.0]))
    assert decided(one_rank).lever == Lever.NONE
    assert decided(one_rank).reason == (
        "balanced: perfect balance would save 0.0 % of a step, below min_gain 2.0 %"
    )


def test_starting_takes_a_margin_that_staying_does_not() -> None:
    between = estimate(drop=(0.025, 0.001))
    assert decided(between).lever == Lever.NONE
    assert decided(between).reason == (
        "not worth a change: best lever drop would save 2.5 % of a step "
        "(confidence 0.90), below min_gain 2.0 % plus switch_margin 1.0 %"
    )
    assert decided(between, holding(Lever.DROP)).lever == Lever.DROP


def test_a_gain_counts_to_start_a_lever_only_as_far_as_it_is_trusted() -> None:
    seen = estimate(drop=(0.05, 0.001), confidence=0.5)
    assert decided(seen).lever == Lever.NONE
    assert decided(seen, holding(Lever.DROP)).lever == Lever.DROP
    assert decided(replace(seen, confidence=0.7)).lever == Lever.DROP


def test_changing_lever_takes_a_further_gain() -> None:
    near = estimate(drop=(0.111, 0.01), expand=(0.10, 0.01))
    far = estimate(drop=(0.112, 0.01), expand=(0.10, 0.01))
    assert decided(near, holding(Lever.EXPAND)).lever == Lever.EXPAND
    assert decided(near, holding(Lever.EXPAND)).reason.startswith("keeping expand: ")
    assert decided(far, holding(Lever.EXPAND)).lever == Lever.DROP


def test_of_levers_that_gain_about_the_same_the_one_that_loses_less_starts() -> None:
    assert decided(estimate(drop=(0.105, 0.010), expand=(0.10, 0.005))).lever == Lever.EXPAND
    assert decided(estimate(drop=(0.115, 0.010), expand=(0.10, 0.005))).lever == Lever.DROP


@pytest.mark.parametrize("lever", [Lever.NONE, Lever.DROP, Lever.REPLICATE])
def test_an_exact_lever_that_suffices_goes_before_a_lossy_one(lever: Lever) -> None:
    seen = estimate(drop=(0.2, 0.01), replicate=0.197)
    assert decided(seen, holding(lever)).lever == Lever.REPLICATE
    assert decided(seen, holding(lever)).expected_lost_mass_share == 0.0


@pytest.mark.parametrize("lever", [Lever.NONE, Lever.DROP, Lever.REPLICATE])
def test_a_lossy_lever_is_for_what_an_exact_one_leaves(lever: Lever) -> None:
    for replicate in (0.05, 0.01):
        assert decided(estimate(drop=(0.2, 0.01), replicate=replicate)).lever == Lever.DROP
    assert decided(estimate(drop=(0.2, 0.03), replicate=0.05)).lever == Lever.REPLICATE


@pytest.mark.parametrize(("lever", "drop", "replicate"), [
    (Lever.DROP, 0.03, 0.03), (Lever.DROP, 0.024, 0.020), (Lever.NONE, 0.034, 0.030),
    (Lever.REPLICATE, 0.034, 0.025),
])  # fmt: skip
def test_an_exact_lever_goes_before_a_lossy_one_even_below_what_starts_it_alone(
    lever: Lever, drop: float, replicate: float
) -> None:
    seen = estimate(drop=(drop, 0.001), replicate=replicate)
    assert decided(seen, holding(lever)).lever == Lever.REPLICATE
    alone = estimate(replicate=replicate)
    assert decided(alone).lever == Lever.NONE


def test_an_exact_lever_below_min_gain_or_that_does_not_suffice_leaves_a_lossy_one() -> None:
    for drop, replicate in ((0.022, 0.019), (0.035, 0.02)):
        seen = estimate(drop=(drop, 0.001), replicate=replicate)
        assert decided(seen, holding(Lever.DROP)).lever == Lever.DROP
    over_budget = estimate(drop=(0.05, 0.03), replicate=0.03)
    assert decided(over_budget).lever == Lever.NONE, "no lossy lever would start"


def test_at_the_edge_of_sufficing_what_is_on_stays_on() -> None:
    edge = estimate(drop=(0.2, 0.01), replicate=0.194)  # drop makes steps 0.75 % shorter
    for lever in (Lever.DROP, Lever.REPLICATE):
        assert decided(edge, holding(lever)).lever == lever
    assert decided(edge).lever == Lever.REPLICATE


def test_what_a_lossy_lever_saves_beyond_balance_does_not_outdo_an_exact_one() -> None:
    balanced = estimate(drop=(0.5, 0.01), replicate=0.295)  # balance can bring 0.3
    assert decided(balanced).lever == Lever.REPLICATE


def test_an_exact_lever_needs_no_budget() -> None:
    settings = config(quality_budget=0.0, downgrade_budget=0.0)
    assert decided(estimate(replicate=0.1), settings=settings).lever == Lever.REPLICATE
    spent = estimate(drop=(0.2, 0.01), replicate=0.1, spent_mass_share=0.1)
    decision = decided(spent, Standing(lever=Lever.DROP, budget_spent=True))
    assert decision.lever == Lever.NONE, "the lever whose budget is spent stops first"
    assert decided(spent, Standing(budget_spent=True)).lever == Lever.REPLICATE
    assert decided(spent).reason == "replicate saves 10.0 % of a step and is exact"


@pytest.mark.parametrize("lever", [Lever.NONE, Lever.DROP])
def test_a_change_waits_for_the_dwell(lever: Lever) -> None:
    other = Lever.DROP if lever == Lever.NONE else Lever.NONE
    seen = estimate(drop=(0.1 if other == Lever.DROP else 0.0, 0.001))
    assert decided(seen, holding(lever, dwell_passes=3)).lever == lever
    assert "1 more passes (min_dwell_passes)" in decided(seen, holding(lever, 3)).reason
    assert decided(seen, holding(lever, dwell_passes=4)).lever == other


def test_the_standing_counts_dwell_from_the_change() -> None:
    _, after = decide(estimate(drop=(0.1, 0.001)), CONFIG, Standing())
    assert after == Standing(lever=Lever.DROP, dwell_passes=0)


def test_a_forecast_beyond_the_budget_is_refused_with_both_numbers() -> None:
    decision = decided(estimate(drop=(0.12, 0.031)))
    assert decision.lever == Lever.NONE
    assert decision.reason == (
        "drop saves 12.0 % of a step and loses 3.1 % of gate mass, but quality_budget 2.0 % "
        "allows 1.6 % to start; raise it or capacity.factor"
    )


def test_a_lever_in_use_may_fill_the_budget_and_one_that_starts_leaves_a_fifth() -> None:
    seen = estimate(drop=(0.12, 0.018))
    assert decided(seen).lever == Lever.NONE
    assert decided(seen, holding(Lever.DROP)).lever == Lever.DROP


def test_a_lever_that_turns_out_too_lossy_stops_at_once() -> None:
    seen = estimate(drop=(0.12, 0.021))
    assert decided(seen, holding(Lever.DROP, dwell_passes=0)).lever == Lever.NONE


def test_a_cheaper_lever_is_taken_where_the_best_is_too_lossy() -> None:
    assert decided(estimate(drop=(0.12, 0.03), expand=(0.06, 0.01))).lever == Lever.EXPAND


@pytest.mark.parametrize("mode", ["auto", "drop", "expand"])
def test_a_spent_budget_stops_every_mode_until_a_fifth_is_free_again(mode: str) -> None:
    settings = in_mode(mode, quality_budget=0.02)
    lever = Lever.EXPAND if mode == "expand" else Lever.DROP
    standing = holding(lever)
    levers = []
    for spent in (0.02, 0.021, 0.019, 0.0161, 0.0159, 0.019):
        seen = estimate(**{lever.name.lower(): (0.1, 0.01)}, spent_mass_share=spent)
        decision, standing = decide(seen, settings, replace(standing, dwell_passes=100))
        levers.append(decision.lever)
        if spent == 0.021:
            assert decision.reason == (
                "quality budget spent: 2.1 % of gate mass lost over the last 256 prefill passes, "
                "quality_budget is 2.0 %; lossy levers resume below 1.6 %"
            )
    assert levers == [lever, Lever.NONE, Lever.NONE, Lever.NONE, lever, lever]


def test_a_budget_of_zero_lets_no_lossy_lever_act() -> None:
    for mode in ("auto", "drop", "expand"):
        decision = decided(estimate(drop=(0.1, 0.0)), settings=in_mode(mode, quality_budget=0.0))
        assert decision.lever == Lever.NONE
        assert decision.reason.startswith("quality_budget is 0")


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"num_passes": 0}, "no prefill pass of at least 2048 tokens seen yet"),
        ({"ms_per_row": 0.0}, "no time of the experts measured yet, so no gain can be forecast"),
        ({"moe_share": 0.0}, "no time of a step measured yet, so no gain can be forecast"),
        ({"num_passes": 1, "confidence": 0.33}, "confidence 0.33 after 1 passes, below 0.47"),
    ],
)
def test_what_is_not_known_is_no_reason_to_act(known: dict[str, Any], reason: str) -> None:
    settings = merge(CONFIG, {"capacity": {"min_batch_tokens": 2048}})
    decision = decided(estimate(drop=(0.1, 0.001), **known), settings=settings)
    assert (decision.lever, decision.reason) == (Lever.NONE, reason)


def test_a_window_of_one_pass_can_still_be_trusted() -> None:
    seen = estimate(drop=(0.1, 0.001), num_passes=1, confidence=1 / 3)
    assert decided(seen, settings=config(window_passes=1)).lever == Lever.DROP


def test_modes_none_and_observe_never_act_and_observe_says_what_auto_would() -> None:
    seen = estimate(drop=(0.1, 0.011))
    assert decided(seen, settings=in_mode("none")).reason == "mode none"
    observed = decided(seen, settings=in_mode("observe"))
    assert observed.lever == Lever.NONE
    assert observed.reason == (
        "observe only: would choose drop, because drop saves 10.0 % of a step "
        "and loses 1.1 % of gate mass"
    )


@pytest.mark.parametrize(("mode", "lever"), [("drop", Lever.DROP), ("expand", Lever.EXPAND)])
def test_a_mode_named_for_a_lever_always_uses_it(mode: str, lever: Lever) -> None:
    for seen in (estimate(), estimate(num_passes=0, forecasts=())):
        decision = decided(seen, settings=in_mode(mode))
        assert (decision.lever, decision.reason) == (lever, f"mode {mode}")
