"""Laws of the quality window and of the mass of a dropped row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_moelb.controller.quality import LossModel, QualityWindow
from sglang_moelb.types import Lever, Metric, Policy, StepRecord

from .world import BALANCED, DROPPED_MASS, SKEWED, TOPOLOGY, record


def used(lever: Lever) -> StepRecord:
    return record(SKEWED, policy=Policy(epoch=0, lever=lever, capacity_factor=1.25))


def window_of(records: list[StepRecord], num_passes: int = 4) -> QualityWindow:
    window = QualityWindow(num_passes)
    for one in records:
        window.add(one)
    return window


def test_the_spent_share_is_mass_lost_over_mass_routed() -> None:
    share = used(Lever.DROP).lost_mass / used(Lever.DROP).routed_mass
    assert share > 0.0
    mixed = [used(Lever.DROP), record(BALANCED)]
    assert window_of(mixed).spent_share == pytest.approx(share / 2)
    assert window_of([]).spent_share == 0.0


def test_a_loss_is_forgotten_after_the_window_and_not_before() -> None:
    spent = used(Lever.DROP)
    assert window_of([spent, *[record(BALANCED)] * 3]).spent_share > 0.0
    assert window_of([spent, *[record(BALANCED)] * 4]).spent_share == 0.0


def test_decode_does_not_flush_the_window() -> None:
    decode = [record(BALANCED, phase="decode")] * 100
    assert window_of([used(Lever.DROP), *decode]).spent_share > 0.0


def test_a_rank_without_tokens_and_a_mass_that_is_not_finite_count_for_nothing() -> None:
    idle = replace(record(BALANCED), routed_mass=0.0)
    broken = replace(record(BALANCED), lost_mass=float("nan"))
    spent = window_of([used(Lever.DROP)]).spent_share
    assert window_of([used(Lever.DROP), idle, broken]).spent_share == spent


def test_a_resized_window_keeps_the_newest_passes() -> None:
    window = window_of([used(Lever.DROP), record(BALANCED), record(BALANCED)])
    assert window.resized(2).spent_share == 0.0
    assert window.resized(100).spent_share == window.spent_share


def test_a_lever_that_was_never_used_has_its_prior() -> None:
    model = LossModel()
    drop = [model.mass_per_dropped_row(Lever.DROP, metric) for metric in Metric]
    expand = [model.mass_per_dropped_row(Lever.EXPAND, metric) for metric in Metric]
    assert drop == [0.5, 1.0, 1.0, 1.0]
    assert expand == [0.25, 0.5, 0.5, 0.5]


def test_the_mass_of_a_dropped_row_is_learned_from_the_lever_that_was_used() -> None:
    model = LossModel()
    for _ in range(100):
        model = model.updated(used(Lever.DROP), TOPOLOGY)
    assert model.mass_per_dropped_row(Lever.DROP, Metric.SCORE) == pytest.approx(
        DROPPED_MASS, rel=0.02
    )
    assert model.mass_per_dropped_row(Lever.EXPAND, Metric.SCORE) == 0.25


def test_passes_that_dropped_nothing_teach_nothing() -> None:
    gated = replace(used(Lever.DROP), gate_reason="small batch")
    for one in (record(SKEWED), gated, replace(used(Lever.DROP), num_dropped_rows=0)):
        assert LossModel().updated(one, TOPOLOGY) == LossModel()
