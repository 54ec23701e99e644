"""Laws of a hot change of the configuration: it holds at once, and what was learned is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sglang_moelb.config import merge, policy_of
from sglang_moelb.controller import forecast
from sglang_moelb.controller.controller import Controller
from sglang_moelb.types import Lever, Observation

from .world import SKEWED, TOPOLOGY, config, in_mode, record, serve

# Of a steady skew, see test_controller.py.
CHOSEN = Lever.EXPAND


def test_a_hot_change_holds_at_once_with_what_was_learned_and_a_new_epoch() -> None:
    controller = Controller(in_mode("observe"), TOPOLOGY)
    before = serve(controller, [SKEWED] * 8)[-1]
    to_auto = controller.reconfigure(config())
    assert (to_auto.lever, to_auto.epoch) == (CHOSEN, before.policy.epoch + 1)
    settings = merge(config(), {"capacity": {"factor": 3.0}})
    wider = controller.reconfigure(settings)
    assert wider.epoch == to_auto.epoch + 1
    assert wider == policy_of(settings, Lever.NONE, epoch=wider.epoch, reason=wider.reason)
    assert wider.reason.startswith("balanced: best lever drop would save 0.0 %")
    off = controller.reconfigure(in_mode("none"))
    assert (off.lever, off.reason, off.epoch) == (Lever.NONE, "mode none", wider.epoch + 1)
    assert controller.policy is off


def test_a_hot_change_waits_for_no_dwell() -> None:
    controller = Controller(config(min_dwell_passes=100), TOPOLOGY)
    assert serve(controller, [SKEWED] * 2)[-1].policy.lever == CHOSEN
    wider = merge(config(min_dwell_passes=100), {"capacity": {"factor": 3.0}})
    assert controller.reconfigure(wider).lever == Lever.NONE


@pytest.mark.parametrize(("change", "num_projected"), [
    ({"mode": "drop"}, 0),
    ({"controller": {"min_gain": 0.5, "quality_budget": 0.0}}, 0),
    ({"capacity": {"factor": 2.0}}, 8),
    ({"downgrade": {"factor": 1.5}}, 8),
    ({"replicate": {"slots": 2}}, 8),
    ({"controller": {"window_passes": 4}}, 8),
])  # fmt: skip
def test_a_hot_change_projects_the_window_anew_only_where_it_changes_the_projections(
    change: dict[str, Any], num_projected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(config(), TOPOLOGY)
    before = serve(controller, [SKEWED] * 8)[-1].estimate
    calls: list[object] = []
    project = forecast.project
    monkeypatch.setattr(forecast, "project", lambda *a: calls.append(a) or project(*a))
    settings = merge(config(), change)
    controller.reconfigure(settings)
    assert len(calls) == num_projected
    after = controller.step(Observation(record=record(SKEWED, phase="decode"), now_s=9.0)).estimate
    assert after.num_passes == min(settings.controller.window_passes, 8)
    assert num_projected or after.forecasts == before.forecasts


def test_passes_that_one_lever_made_longer_do_not_count_against_that_of_a_hot_change() -> None:
    settings = config(interval_ms=60_000.0)
    controller = Controller(settings, TOPOLOGY)
    serve(controller, [SKEWED] * 8)
    assert controller.reconfigure(settings).lever == CHOSEN

    def lose(num_passes: int) -> list[Lever]:
        held = []
        for _ in range(num_passes):
            short = record(tuple(n // 100 for n in SKEWED), policy=controller.policy)
            slowed = replace(short, balance_ms=1.0, step_ms=short.step_ms + 1.0)
            effects = controller.step(Observation(record=slowed, now_s=1.0))
            held.append(effects.policy.lever)
        return held

    assert lose(3) == [CHOSEN] * 3
    assert controller.reconfigure(settings).lever == Lever.DROP
    assert lose(4) == [Lever.DROP] * 3 + [Lever.NONE]


def test_masses_of_dropped_rows_are_learned_anew_under_another_capacity() -> None:
    controller = Controller(in_mode("drop", quality_budget=1.0), TOPOLOGY)
    learned = serve(controller, [SKEWED] * 30)[-1].estimate.forecasts[1].lost_mass_share
    controller.reconfigure(in_mode("observe", quality_budget=0.5))
    kept = serve(controller, [SKEWED])[-1].estimate.forecasts[1].lost_mass_share
    assert kept == pytest.approx(learned)
    controller.reconfigure(merge(in_mode("observe"), {"capacity": {"metric": "random"}}))
    blind = serve(controller, [SKEWED])[-1].estimate.forecasts[1].lost_mass_share
    assert blind == pytest.approx(2300 / 8000)


def test_the_same_change_twice_still_gives_a_new_epoch() -> None:
    controller = Controller(config(), TOPOLOGY)
    assert [controller.reconfigure(config()).epoch for _ in range(3)] == [1, 2, 3]


def test_200_hot_changes_leave_the_controller_as_it_was() -> None:
    controller = Controller(config(), TOPOLOGY)
    before = serve(controller, [SKEWED] * 8)[-1]
    modes = ("none", "observe", "drop", "expand", "auto")
    for i in range(200):
        controller.reconfigure(in_mode(modes[i % 5]))
    after = serve(controller, [SKEWED])[-1]
    assert after.policy.lever == before.policy.lever
    assert after.policy.epoch == before.policy.epoch + 200
