"""Scores -> Verdict: should a lever be turned on, which, and why or why not.

A lever is recommended only if the lower end of the interval of its gain is above `min_gain`, and
the gate mass that it would lose and the rows at low precision are within their budgets. What a
lever takes itself counts against its gain: as measured on this server where the lever has been used
since the start, else as assumed from what counting takes here, and then the interval spans from
half of that to twice.

Shape letters: N samples, V levers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.controller import reasons
from sglang_moelb.controller.batch_means import MIN_SAMPLES, share_of
from sglang_moelb.controller.decide import EXACT, LOSSY, TIER, suffices
from sglang_moelb.controller.reasons import RESUME_SHARE
from sglang_moelb.controller.scoreboard import Sample, Scoreboard
from sglang_moelb.types import Lever, LeverScore, LoadEstimate, Verdict
from sglang_moelb.words import LEVERS

TELL_S = 5.0  # a verdict is made anew at most so often


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCost:
    """Milliseconds of a pass that a lever takes itself: expected, and at worst.

    `least_ms` is for the upper end of the interval.
    """

    ms: float
    least_ms: float
    worst_ms: float
    measured: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class AssumedCost:
    """Of a lever never used here: `fixed_ms + per_none * none_ms` a MoE layer.

    `none_ms` is what a pass without a lever takes for counting and exchanging once, measured here:
    a lever does that in every layer. So a device that waits for its host tells beforehand that a
    lever will wait too.
    """

    fixed_ms: float
    per_none: float


# Through both measurements of drop on 4 H100 (docs/results.md): 0.118 ms a layer where none takes
# 0.04 a pass, at 16,384 tokens a rank, and 0.944 where it takes 0.61, at 1,024. Of expand only the
# first, 0.49, is known.
ASSUMED = {
    Lever.DROP: AssumedCost(fixed_ms=0.06, per_none=1.45),
    Lever.EXPAND: AssumedCost(fixed_ms=0.43, per_none=1.45),
    # 0.15 ms a layer were exposed on two H100 at 16,384 tokens a rank, copies included.
    Lever.REPLICATE: AssumedCost(fixed_ms=0.09, per_none=1.45),
}
ASSUMED_OTHERS = ASSUMED[Lever.EXPAND]
ASSUMED_NONE_MS = 0.61  # the worse of the two, where this too is not measured yet
ASSUMED_WITHIN = 2.0  # the interval goes from half of what is assumed to twice
# Milliseconds a layer by which steps took longer than a lever's own clocks show, 4 H100 at 16,384
# tokens a rank and skew 1: under expand DeepEP carries wider rows.
BESIDE_MS = {Lever.EXPAND: 0.9}


def judge(
    board: Scoreboard, *, estimate: LoadEstimate, config: Config, num_layers: int
) -> Verdict:
    """The verdict on the passes scored so far.

    Args:
        board: the samples, and what each lever takes itself as far as measured.
        estimate: what the controller believes after the last pass.
        config: mode and limits.
        num_layers: MoE layers of the model.

    Intervals are those of `batch_means.share_of`, widened by what is not known of a lever's own
    time. Runs on the host. Ours.
    """
    samples = board.samples
    scores: tuple[LeverScore, ...] = ()
    if len(samples) >= MIN_SAMPLES:
        costs = [own_cost(lever, board, num_layers) for lever in board.levers]
        scores = _scores(samples, board.levers, costs)
    needed = MIN_SAMPLES
    if samples:
        needed = math.ceil(MIN_SAMPLES * board.num_passes / len(samples))
    lever, reason = Lever.NONE, _unknown(estimate, config, board.num_passes, needed)
    if scores:
        best = _best(scores, estimate, config)
        lever = best.lever if best else Lever.NONE
        reason = _gains(best) if best else _why_not(scores, estimate, config)
    return Verdict(
        lever=lever,
        text=_text(lever, reason, config, known=bool(scores)),
        reason=reason,
        num_passes=board.num_passes,
        num_passes_needed=needed,
        num_small_passes=sum(sample.num_small for sample in samples),
        scores=scores,
        log_interval_s=config.verdict.log_interval_s,
    )


def line(verdict: Verdict) -> str:
    """The verdict with the number of passes that it rests on. Runs on the host."""
    return f"{verdict.text} ({verdict.num_passes} passes)" if verdict.scores else verdict.text


def own_cost(lever: Lever, board: Scoreboard, num_layers: int) -> OwnCost:
    """What `lever` takes of a pass itself, beyond a pass without one. Runs on the host. Ours."""
    beside_ms = BESIDE_MS.get(lever, 0.0) * num_layers
    none_ms, lever_ms = board.own_ms(Lever.NONE), board.own_ms(lever)
    if lever_ms > 0.0:
        extra_ms = max(lever_ms - none_ms, 0.0) + beside_ms
        return OwnCost(ms=extra_ms, least_ms=extra_ms, worst_ms=extra_ms, measured=True)
    assumed = ASSUMED.get(lever, ASSUMED_OTHERS)
    layer_ms = assumed.fixed_ms + assumed.per_none * (none_ms or ASSUMED_NONE_MS)
    own_ms = layer_ms * num_layers
    return OwnCost(
        ms=own_ms + beside_ms,
        least_ms=own_ms / ASSUMED_WITHIN + beside_ms,
        worst_ms=own_ms * ASSUMED_WITHIN + beside_ms,
        measured=False,
    )


def _scores(
    samples: Sequence[Sample], levers: Sequence[Lever], costs: Sequence[OwnCost]
) -> tuple[LeverScore, ...]:
    num_passes_N = np.array([one.num_passes for one in samples], dtype=np.float64)
    num_tokens_N = np.array([one.num_tokens for one in samples])
    prefill_ms_N = np.array([one.prefill_ms for one in samples])
    spared_ms_NV = np.array([one.spared_ms_V for one in samples])
    weight_N = num_tokens_N / num_tokens_N.sum()
    lost_share_V = weight_N @ np.array([one.lost_share_V for one in samples])
    low_share_V = weight_N @ np.array([one.low_share_V for one in samples])
    passes_per_ms = float(num_passes_N.sum() / prefill_ms_N.sum())
    scores = []
    for at, (lever, cost) in enumerate(zip(levers, costs, strict=True)):
        gain, half = share_of(spared_ms_NV[:, at] - cost.ms * num_passes_N, prefill_ms_N)
        scores.append(
            LeverScore(
                lever=lever,
                gain=gain,
                gain_low=gain - half - (cost.worst_ms - cost.ms) * passes_per_ms,
                gain_high=gain + half + (cost.ms - cost.least_ms) * passes_per_ms,
                lost_mass_share=float(lost_share_V[at]),
                low_share=float(low_share_V[at]),
                measured=cost.measured,
            )
        )
    return tuple(scores)


def _best(
    scores: Sequence[LeverScore], estimate: LoadEstimate, config: Config
) -> LeverScore | None:
    """Of those that surely pay, as mode `auto` chooses: exact first, then the least lossy."""
    limits = config.controller
    allowed = [
        one
        for one in scores
        if one.gain_low > limits.min_gain and _affordable(one, estimate, config)
    ]
    margin = limits.switch_margin
    lossies = [one for one in allowed if TIER[one.lever] == LOSSY]
    exact = max((one for one in allowed if TIER[one.lever] == EXACT), key=_gain, default=None)
    top = max(map(_gain, lossies), default=0.0) - margin
    lossy = min(
        (one for one in lossies if one.gain >= top),
        key=lambda one: (one.lost_mass_share, one.low_share, -one.gain),
        default=None,
    )
    if not exact or not lossy:
        return exact or lossy
    return exact if suffices(exact.gain, lossy.gain, margin) else lossy


def _gain(score: LeverScore) -> float:
    return score.gain


def _affordable(score: LeverScore, estimate: LoadEstimate, config: Config) -> bool:
    return not _forbids(score, estimate, config)


def _forbids(score: LeverScore, estimate: LoadEstimate, config: Config) -> str:
    """Which budget forbids a lever that pays, and what would allow it; "" if none does."""
    limits = config.controller
    for knob, factor, budget, asked, spent, why in (
        ("quality_budget", "capacity.factor", limits.quality_budget, score.lost_mass_share,
         estimate.spent_mass_share, reasons.budget_spent),
        ("downgrade_budget", "downgrade.factor", limits.downgrade_budget, score.low_share,
         estimate.spent_low_share, reasons.low_spent),
    ):  # fmt: skip
        if asked == 0.0 or budget == 1.0:
            continue
        if budget == 0.0 or spent > budget:
            return why(estimate, config)
        if asked > RESUME_SHARE * budget:
            return (
                f"{knob} {reasons.percent(budget)} allows "
                f"{reasons.percent(RESUME_SHARE * budget)} to start; raise it or {factor}"
            )
    return ""


def _unknown(estimate: LoadEstimate, config: Config, num_passes: int, needed: int) -> str:
    size = f"passes of at least {config.capacity.min_batch_tokens} tokens"
    if estimate.num_passes == 0:
        return f"not enough: no prefill {size} seen yet"
    if not num_passes and estimate.ms_per_row <= 0.0:
        return "not enough: no time of the experts measured yet"
    if not num_passes and estimate.moe_share <= 0.0:
        return "not enough: no time of a step measured yet"
    return f"not enough: {num_passes} of {needed} {size}"


def _why_not(scores: Sequence[LeverScore], estimate: LoadEstimate, config: Config) -> str:
    limits = config.controller
    paying = [one for one in scores if one.gain_low > limits.min_gain]
    if paying:
        one = max(paying, key=lambda one: one.gain)
        return f"{_gains(one)}, but {_forbids(one, estimate, config)}"
    one = max(scores, key=lambda one: one.gain)
    least = f"min_gain {reasons.percent(limits.min_gain)}"
    gain = f"the best lever, {reasons.name(one.lever)}, has an expected gain of {_interval(one)}"
    if one.gain <= limits.min_gain:
        return f"{gain}, not above {least}"
    why = f"{gain}, which is not surely above {least}"
    if not one.measured:
        why += (
            f"; what {reasons.name(one.lever)} takes itself is assumed until it has been used "
            "on this server"
        )
    return why


def _text(lever: Lever, reason: str, config: Config, *, known: bool) -> str:
    fixed = LEVERS.get(config.mode)
    if lever is not Lever.NONE:
        verb = "keep" if fixed is lever else "turn on"
        return f"{'keep auto on, best with' if config.mode == 'auto' else verb} {reason}"
    if config.mode == "auto":
        return f"leave it to auto, because {reason}"
    if fixed is None:
        return f"leave it off, because {reason}"
    return f"{'turn it off' if known else 'leave it as it is'}, because {reason}"


def _gains(score: LeverScore) -> str:
    costs = ["exact"] if score.lever is Lever.REPLICATE else ["costs no gate mass"]
    if score.lost_mass_share > 0.0:
        costs = [f"costs {reasons.percent(score.lost_mass_share)} of gate mass"]
    if score.low_share > 0.0:
        costs.append(f"computes {reasons.percent(score.low_share)} of rows at low precision")
    gain = f"{reasons.name(score.lever)}: expected gain {_interval(score)}"
    return ", ".join([gain, *costs])


def _interval(score: LeverScore) -> str:
    low, high = (round(100.0 * gain, 1) + 0.0 for gain in (score.gain_low, score.gain_high))
    return f"{reasons.percent(score.gain)} [{low:.1f}, {high:.1f}] of prefill time"
