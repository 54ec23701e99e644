"""LoadEstimate -> Decision: is it worth it, which lever, and why or why not.

`none` is a lever like the others and wins unless another one earns its place. In order: the quality
budgets, whether anything is known, gain, quality, exact levers before lossy ones (unless the lossy
one makes steps shorter by more than `switch_margin` beyond), and dwell (`min_dwell_passes` between
changes). To stay, a lever must save `min_gain`; to start or replace
another, `switch_margin` more, of a gain that counts only as far as the estimate is trusted: loads
that come and go lower the confidence, so the two thresholds move apart where noise would flap. An
exact lever takes the place of a lossy one from `min_gain` on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sglang_moelb.config import Config
from sglang_moelb.controller import reasons
from sglang_moelb.controller.load import full_confidence
from sglang_moelb.controller.reasons import RESUME_SHARE
from sglang_moelb.types import Decision, Lever, LeverForecast, LoadEstimate
from sglang_moelb.words import LEVERS

EXACT, LOSSY = 0, 1  # see `suffices`
TIER = {
    Lever.REPLICATE: EXACT,
    Lever.EXPAND: LOSSY,
    Lever.DROP: LOSSY,
    Lever.DOWNGRADE: LOSSY,
}
# Of the confidence that a full window of equal passes gives: to start a lever, and to keep it.
START_CONFIDENCE = 0.5
KEEP_CONFIDENCE = 0.4
LEAVE_LOSSY = 0.5  # of switch_margin, within which an exact lever takes over from a lossy one


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where the last decision left things.

    `lever` is the one that auto's rules hold to (in observe nothing of it is published),
    `dwell_passes` the passes of the window since it changed, `budget_spent` whether the quality
    budget was exceeded and has not recovered yet, `low_spent` the same of the downgrade budget.
    """

    lever: Lever = Lever.NONE
    dwell_passes: int = 1 << 30
    budget_spent: bool = False
    low_spent: bool = False


def decide(estimate: LoadEstimate, config: Config, standing: Standing) -> tuple[Decision, Standing]:
    """The lever for the next pass, and the standing for the next decision.

    Args:
        estimate: what is believed after the last pass.
        config: mode and limits; the mode must be one whose lever exists.
        standing: as returned before, with `dwell_passes` counted on by the caller.

    The budgets hold in every mode: quality_budget for what loses gate mass, downgrade_budget for
    what computes at low precision. Runs on the host. Ours.
    """
    limits = config.controller
    spent = _spent(estimate.spent_mass_share, limits.quality_budget, standing.budget_spent)
    low_spent = _spent(estimate.spent_low_share, limits.downgrade_budget, standing.low_spent)
    if (spent, low_spent) != (standing.budget_spent, standing.low_spent):
        standing = replace(standing, budget_spent=spent, low_spent=low_spent)
    mode = config.mode
    if mode in LEVERS:
        decision = _fixed(LEVERS[mode], estimate, config, standing)
        return decision, _moved(standing, decision.lever)
    choice = _choose(estimate, config, standing)
    standing = _moved(standing, choice.lever)
    if mode == "none":
        return _none("mode none"), standing
    if mode == "observe":
        would = f"would choose {reasons.name(choice.lever)}, because {choice.reason}"
        return _none(f"observe only: {would}"), standing
    return choice, standing


def _choose(estimate: LoadEstimate, config: Config, standing: Standing) -> Decision:
    opened = [f for f in estimate.forecasts if not _closed(f.lever, standing)]
    unknown = _unknown(estimate, config, standing)
    if standing.budget_spent and (unknown or not opened):
        too = f"; {reasons.low_spent(estimate, config)}" if standing.low_spent else ""
        return _none(reasons.budget_spent(estimate, config) + too)
    if unknown:
        return _none(unknown)
    if _closed(standing.lever, standing):
        return _none(_why_closed(standing.lever, estimate, config))
    current = _find(opened, standing.lever)
    if current and _spends(current) > _budget(current.lever, config):
        return _none(reasons.too_lossy(current, config))
    bound = _bound(estimate)
    paying = [f for f in opened if _pays(f, bound, estimate, config, standing)]
    allowed = [f for f in paying if _affordable(f, config, standing)]
    if any(TIER[f.lever] == LOSSY for f in allowed):
        # An exact lever is asked first even where it would not start by itself.
        exacts = [f for f in opened if TIER[f.lever] == EXACT and _keeps(f, bound, config)]
        allowed += [f for f in exacts if f not in allowed]
    best = _best(allowed, bound, config, current)
    if (
        current and best and current in allowed
        and not _outdoes(best, current, bound, estimate, config)
    ):  # fmt: skip
        return _take(current, f"keeping {reasons.name(current.lever)}: {reasons.gains(current)}")
    to_lever = best.lever if best else Lever.NONE
    wait = config.controller.min_dwell_passes - standing.dwell_passes
    if to_lever != standing.lever and wait > 0:
        hold = f"holding {reasons.name(standing.lever)} for {wait} more passes (min_dwell_passes)"
        reason = f"{hold} before a change to {reasons.name(to_lever)}"
        return _take(current, reason) if current else _none(reason)
    if current and TIER[current.lever] == EXACT and current.gain < 0.0:
        # Not at once to a lossy one: what makes this one slow may hold for that too.
        return _none(reasons.loses_time(current))
    if best:
        return _take(best, reasons.gains(best))
    if paying:
        return _none(reasons.too_lossy(max(paying, key=lambda f: f.gain), config))
    if standing.budget_spent:
        return _none(reasons.budget_spent(estimate, config))
    low = _find(estimate.forecasts, Lever.DOWNGRADE)
    if standing.low_spent and low and _pays(low, bound, estimate, config, standing):
        return _none(reasons.low_spent(estimate, config))
    return _none(reasons.balanced(estimate, config, standing.lever, bound))


def _fixed(lever: Lever, estimate: LoadEstimate, config: Config, standing: Standing) -> Decision:
    if _closed(lever, standing):
        return _none(_why_closed(lever, estimate, config))
    no_pass = LeverForecast(lever=lever, balance=1.0, gain=0.0, lost_mass_share=0.0)
    return _take(_find(estimate.forecasts, lever) or no_pass, f"mode {config.mode}")


def _closed(lever: Lever, standing: Standing) -> bool:
    """Whether the budget of `lever` is spent."""
    if lever is Lever.DOWNGRADE:
        return standing.low_spent
    return lever.cuts and standing.budget_spent


def _why_closed(lever: Lever, estimate: LoadEstimate, config: Config) -> str:
    why = reasons.low_spent if lever is Lever.DOWNGRADE else reasons.budget_spent
    return why(estimate, config)


def _spends(forecast: LeverForecast) -> float:
    """What a lever takes of its budget."""
    return forecast.low_share if forecast.lever is Lever.DOWNGRADE else forecast.lost_mass_share


def _budget(lever: Lever, config: Config) -> float:
    limits = config.controller
    return limits.downgrade_budget if lever is Lever.DOWNGRADE else limits.quality_budget


def _spent(spent_share: float, budget: float, was_spent: bool) -> bool:
    recovered = spent_share < RESUME_SHARE * budget
    return budget == 0.0 or spent_share > budget or (was_spent and not recovered)


def _unknown(estimate: LoadEstimate, config: Config, standing: Standing) -> str:
    if estimate.num_passes == 0:
        return f"no prefill pass of at least {config.capacity.min_batch_tokens} tokens seen yet"
    if estimate.ms_per_row <= 0.0:
        return "no time of the experts measured yet, so no gain can be forecast"
    if estimate.moe_share <= 0.0:
        return "no time of a step measured yet, so no gain can be forecast"
    share = START_CONFIDENCE if standing.lever == Lever.NONE else KEEP_CONFIDENCE
    needed = share * full_confidence(config.controller.window_passes)
    if estimate.confidence < needed:
        return (
            f"confidence {estimate.confidence:.2f} after {estimate.num_passes} passes, "
            f"below {needed:.2f}"
        )
    return ""


def _bound(estimate: LoadEstimate) -> float:
    """Share of a step that perfect balance would save."""
    return estimate.moe_share * (1.0 - 1.0 / float(estimate.balance_L.mean()))


def _pays(
    forecast: LeverForecast,
    bound: float,
    estimate: LoadEstimate,
    config: Config,
    standing: Standing,
) -> bool:
    if forecast.lever == standing.lever:
        return _keeps(forecast, bound, config)
    limits = config.controller
    gain = _counted(forecast, bound)
    return gain > 0.0 and gain * estimate.confidence >= limits.min_gain + limits.switch_margin


def _keeps(forecast: LeverForecast, bound: float, config: Config) -> bool:
    """Whether a lever saves enough to stay."""
    gain = _counted(forecast, bound)
    return gain > 0.0 and gain >= config.controller.min_gain


def _counted(forecast: LeverForecast, bound: float) -> float:
    # A lossy lever also makes a balanced load cheaper, by doing less of it; that is not what the
    # user asked for, so a gain counts only as far as balance could have brought it.
    return min(forecast.gain, bound)


def _affordable(forecast: LeverForecast, config: Config, standing: Standing) -> bool:
    # A window that holds nothing but this lever must stay inside the budget; what is spent now
    # leaves the window as it slides, and `_budget_spent` guards the time until then.
    budget = _budget(forecast.lever, config)
    share = 1.0 if forecast.lever == standing.lever or budget == 1.0 else RESUME_SHARE
    return _spends(forecast) <= share * budget


def suffices(exact_gain: float, lossy_gain: float, margin: float) -> bool:
    """Whether a lossy lever would make a step at most the share `margin` shorter than an exact one.

    Then it is not worth what it loses. Runs on the host. Ours.
    """
    return lossy_gain - exact_gain <= margin * (1.0 - lossy_gain)


def _best(
    forecasts: Sequence[LeverForecast],
    bound: float,
    config: Config,
    current: LeverForecast | None,
) -> LeverForecast | None:
    """The exact lever of most gain if it suffices, else the best lossy one.

    A lossy lever that is on is left for an exact one only well inside the margin, so that a gain at
    its edge does not flap.
    """
    margin = config.controller.switch_margin
    exacts = [f for f in forecasts if TIER[f.lever] == EXACT]
    exact = max(exacts, key=lambda f: f.gain, default=None)
    lossy = _least_lossy([f for f in forecasts if TIER[f.lever] == LOSSY], margin)
    if not exact or not lossy:
        return exact or lossy
    if current and TIER[current.lever] == LOSSY:
        margin *= LEAVE_LOSSY
    return exact if suffices(exact.gain, min(lossy.gain, bound), margin) else lossy


def _least_lossy(forecasts: Sequence[LeverForecast], margin: float) -> LeverForecast | None:
    """The one that loses least among those within a margin of the top gain."""
    top = max((f.gain for f in forecasts), default=0.0) - margin
    return min(
        (f for f in forecasts if f.gain >= top),
        key=lambda f: (f.lost_mass_share, f.low_share, -f.gain),
        default=None,
    )


def _outdoes(
    best: LeverForecast,
    current: LeverForecast,
    bound: float,
    estimate: LoadEstimate,
    config: Config,
) -> bool:
    """Whether to change over to `best`, on which `_best` settled."""
    margin = config.controller.switch_margin
    if TIER[best.lever] < TIER[current.lever]:
        return True
    if TIER[best.lever] > TIER[current.lever]:
        return not suffices(current.gain, min(best.gain, bound), margin / estimate.confidence)
    return (best.gain - current.gain) * estimate.confidence > margin


def _find(forecasts: Sequence[LeverForecast], lever: Lever) -> LeverForecast | None:
    return next((f for f in forecasts if f.lever == lever), None)


def _moved(standing: Standing, lever: Lever) -> Standing:
    return standing if lever == standing.lever else replace(standing, lever=lever, dwell_passes=0)


def _take(forecast: LeverForecast, reason: str) -> Decision:
    return Decision(
        lever=forecast.lever,
        reason=reason,
        expected_gain=forecast.gain,
        expected_lost_mass_share=forecast.lost_mass_share,
        expected_low_share=forecast.low_share,
    )


def _none(reason: str) -> Decision:
    return Decision(
        lever=Lever.NONE, reason=reason, expected_gain=0.0, expected_lost_mass_share=0.0
    )
