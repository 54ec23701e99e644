"""The sentences that go with decisions: what was weighed, by how much, and what would change it."""

from __future__ import annotations

from sglang_moelb.config import Config
from sglang_moelb.types import Lever, LeverForecast, LoadEstimate

RESUME_SHARE = 0.8  # of the quality budget: to start a lever, and to resume after it was spent


def budget_spent(estimate: LoadEstimate, config: Config) -> str:
    """Why lossy levers are off although the mode allows them. Runs on the host. Ours."""
    limits = config.controller
    if limits.quality_budget == 0.0:
        return "quality_budget is 0, so lossy levers are off; raise it to allow them"
    return (
        f"quality budget spent: {percent(estimate.spent_mass_share)} of gate mass lost over the "
        f"last {limits.quality_window_passes} prefill passes, quality_budget is "
        f"{percent(limits.quality_budget)}; lossy levers resume below "
        f"{percent(RESUME_SHARE * limits.quality_budget)}"
    )


def low_spent(estimate: LoadEstimate, config: Config) -> str:
    """Why downgrade is off although the mode allows it. Runs on the host. Ours."""
    limits = config.controller
    if limits.downgrade_budget == 0.0:
        return "downgrade_budget is 0, so downgrade is off; raise it to allow it"
    return (
        f"downgrade budget spent: {percent(estimate.spent_low_share)} of rows at low precision "
        f"over the last {limits.quality_window_passes} prefill passes, downgrade_budget is "
        f"{percent(limits.downgrade_budget)}; downgrade resumes below "
        f"{percent(RESUME_SHARE * limits.downgrade_budget)}"
    )


def too_lossy(forecast: LeverForecast, config: Config) -> str:
    """Why a lever that pays is not taken. Runs on the host. Ours."""
    limits = config.controller
    knob, budget, factor = "quality_budget", limits.quality_budget, "capacity.factor"
    if forecast.lever is Lever.DOWNGRADE:
        knob, budget, factor = "downgrade_budget", limits.downgrade_budget, "downgrade.factor"
    return (
        f"{gains(forecast)}, but {knob} {percent(budget)} allows "
        f"{percent(RESUME_SHARE * budget)} to start; raise it or {factor}"
    )


def balanced(estimate: LoadEstimate, config: Config, current: Lever, bound: float) -> str:
    """Why no lever pays; `bound` is what perfect balance would save. Runs on the host. Ours."""
    limits = config.controller
    best = max(estimate.forecasts, key=lambda f: f.gain)
    would = f"best lever {name(best.lever)} would save {percent(best.gain)} of a step"
    if bound < best.gain:
        would = f"perfect balance would save {percent(bound)} of a step"
    below = f"below min_gain {percent(limits.min_gain)}"
    if best.lever != current and min(best.gain, bound) >= limits.min_gain:
        below += f" plus switch_margin {percent(limits.switch_margin)}"
        return f"not worth a change: {would} (confidence {estimate.confidence:.2f}), {below}"
    return f"balanced: {would}, {below}"


def gains(forecast: LeverForecast) -> str:
    """What a lever brings and costs. Runs on the host. Ours."""
    if forecast.lever is Lever.DOWNGRADE:
        return (
            f"{name(forecast.lever)} saves {percent(forecast.gain)} of a step "
            f"and computes {percent(forecast.low_share)} of rows at low precision"
        )
    if forecast.lever is Lever.REPLICATE:
        return f"{name(forecast.lever)} saves {percent(forecast.gain)} of a step and is exact"
    return (
        f"{name(forecast.lever)} saves {percent(forecast.gain)} of a step "
        f"and loses {percent(forecast.lost_mass_share)} of gate mass"
    )


def loses_time(forecast: LeverForecast) -> str:
    """Why an exact lever is stopped. Runs on the host. Ours."""
    return (
        f"{name(forecast.lever)} takes more time than it saves: {percent(-forecast.gain)} of a step"
    )


def name(lever: Lever) -> str:
    """A lever as users write it. Runs on the host. Ours."""
    return lever.name.lower()


def percent(share: float) -> str:
    """A share in per cent with one decimal. Runs on the host. Ours."""
    return f"{100.0 * share:.1f} %"
