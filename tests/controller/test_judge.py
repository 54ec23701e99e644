"""Laws of `verdict.judge` on boards of samples: what it says, and what it never recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.controller import verdict as judging
from sglang_moelb.controller.batch_means import MIN_SAMPLES
from sglang_moelb.controller.scoreboard import Sample
from sglang_moelb.types import Lever, LoadEstimate

from .world import judged, score

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
