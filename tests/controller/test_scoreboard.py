"""Laws of the samples of a verdict: which passes they stand for, and when they are let go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_moelb.config import merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.scoreboard import SAMPLE_S, SETTLE_PASSES
from sglang_moelb.types import Lever, Observation, StepRecord

from .test_verdict import JUDGING, after, feed, judged, score, steady, verdict_of
from .world import BALANCED, SKEWED, TOPOLOGY, config, in_mode, record, serve


def gain(config_of: object, records: list[StepRecord], pass_s: float = 0.5) -> float:
    controller = Controller(config_of, TOPOLOGY)  # type: ignore[arg-type]
    return score(verdict_of(feed(controller, records, pass_s)), Lever.DROP).gain


def test_passes_between_two_forecasts_are_scored_too() -> None:
    # 100 passes a second, a forecast every 100 ms, a sample every half second.
    waves = [record(SKEWED if (i // 5) % 2 else BALANCED, step=i) for i in range(2400)]
    controller = feed(Controller(judged(), TOPOLOGY), waves, 0.01)
    verdict = verdict_of(controller)
    assert 2048 - 100 * SAMPLE_S <= verdict.num_passes <= 2048
    every = gain(judged(), waves[:400])
    assert score(verdict, Lever.DROP).gain == pytest.approx(every, rel=0.1)


def test_more_passes_than_the_window_holds_are_spoken_for_by_the_newest() -> None:
    passes = steady(SKEWED, 1000)
    few = merge(judged(window_passes=1), {})
    verdict = verdict_of(feed(Controller(few, TOPOLOGY), passes, 0.02))
    assert verdict.num_passes >= 950
    whole = verdict_of(feed(Controller(judged(), TOPOLOGY), passes, 0.02))
    found, expected = (score(one, Lever.DROP).gain for one in (verdict, whole))
    assert found == pytest.approx(expected, rel=0.01)


def test_small_passes_count_with_their_time_and_no_gain() -> None:
    settings = merge(judged(), {"capacity": {"min_batch_tokens": 1000}})
    small = replace(record([n // 10 for n in SKEWED]), step_ms=20.62)
    mixed = [one for pair in zip(steady(SKEWED), [small] * 60, strict=True) for one in pair]
    alone = gain(settings, steady(SKEWED))
    controller = feed(Controller(settings, TOPOLOGY), mixed)
    found = score(verdict_of(controller), Lever.DROP).gain
    assert found == pytest.approx(alone / 2.0, rel=0.02)
    assert verdict_of(controller).num_small_passes == pytest.approx(60, abs=2)


def test_decode_and_idle_passes_are_not_prefill_time() -> None:
    others = [record(SKEWED, phase=phase) for phase in ("decode", "idle")] * 60
    mixed = [one for pair in zip(steady(SKEWED), others[:60], strict=True) for one in pair]
    assert gain(judged(), mixed) == pytest.approx(gain(judged(), steady(SKEWED)))


def test_a_compile_in_the_first_passes_leaves_no_trace() -> None:
    compiling = [replace(record(SKEWED), step_ms=8000.0)] * 2
    found = after(judged(), [*compiling, *steady(SKEWED)])
    expected = after(judged(), steady(SKEWED, 62))
    assert score(found, Lever.DROP).gain == pytest.approx(score(expected, Lever.DROP).gain)
    assert SETTLE_PASSES > 4


def test_a_stall_of_one_pass_leaves_no_trace() -> None:
    stalled = steady(SKEWED)
    stalled[30] = replace(stalled[30], step_ms=8000.0)
    assert gain(judged(), stalled) == pytest.approx(gain(judged(), steady(SKEWED)), rel=0.01)


def test_doing_less_of_a_balanced_load_is_no_gain() -> None:
    cutting = merge(judged(quality_budget=1.0), {"capacity": {"factor": 0.5}})
    verdict = after(cutting, steady(BALANCED))
    assert verdict.lever is Lever.NONE
    assert score(verdict, Lever.DROP).gain <= 0.0


def test_only_the_last_passes_of_the_window_are_scored() -> None:
    settings = merge(judged(), {"verdict": {"window_passes": 64}})
    turned = [*steady(SKEWED, 200), *steady(BALANCED, 150)]
    verdict = after(settings, turned)
    assert verdict.num_passes == 64
    assert score(verdict, Lever.DROP).gain < 0.0
    assert score(after(judged(), turned), Lever.DROP).gain > 0.05


def test_a_new_rule_lets_go_of_the_samples_and_a_new_mode_does_not() -> None:
    controller = feed(Controller(judged(), TOPOLOGY), steady(SKEWED))
    before = verdict_of(controller).num_passes
    controller.reconfigure(judged("drop"))
    assert verdict_of(controller).num_passes == before
    for rule in ({"capacity": {"factor": 1.5}}, {"downgrade": {"factor": 1.5}}):
        controller.reconfigure(judged("drop"))
        feed(controller, steady(SKEWED), from_s=1e3)
        assert verdict_of(controller).num_passes > 0
        controller.reconfigure(merge(judged("drop"), rule))
        assert verdict_of(controller).num_passes == 0


def test_it_is_off_unless_asked_for_and_can_be_turned_on_and_off_while_serving() -> None:
    controller = Controller(in_mode("observe"), TOPOLOGY)
    assert {effects.verdict for effects in serve(controller, [SKEWED] * 40)} == {None}
    assert controller.verdict() is None
    controller.reconfigure(judged())
    feed(controller, steady(SKEWED), from_s=100.0)
    assert verdict_of(controller).lever is not Lever.NONE
    controller.reconfigure(in_mode("observe"))
    last = controller.step(Observation(record=record(SKEWED), now_s=200.0))
    assert last.verdict is None
    controller.reconfigure(judged())
    assert verdict_of(controller).num_passes == 0


def test_the_verdict_changes_no_decision() -> None:
    wave = [SKEWED if i % 30 < 20 else BALANCED for i in range(200)]
    plain = serve(Controller(config(), TOPOLOGY), wave)
    with_verdict = serve(Controller(merge(config(), {"verdict": JUDGING}), TOPOLOGY), wave)
    assert [e.policy for e in plain] == [e.policy for e in with_verdict]
    assert [e.decision for e in plain] == [e.decision for e in with_verdict]
    assert with_verdict[-1].verdict is not None


def test_it_is_made_anew_no_more_often_than_it_is_told() -> None:
    settings = merge(judged(), {"verdict": {"log_interval_s": 1.0}})
    controller = Controller(settings, TOPOLOGY)
    made = {
        id(controller.step(Observation(record=record(SKEWED), now_s=0.1 * i)).verdict): i
        for i in range(100)
    }
    assert 9 <= len(made) <= 11
