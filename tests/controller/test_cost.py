"""Laws of the cost model. Shape letters: L MoE layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.controller import cost, load
from sglang_moelb.types import Lever, Policy, StepRecord

from .world import BALANCED, FIXED_MS, MS_PER_ROW, SKEWED, TOPOLOGY, record, without_times

MIXED = [record(BALANCED), record(SKEWED), record(SKEWED, scale=2), record(BALANCED, scale=3)]


def loads(records: list[StepRecord]) -> list[load.PassLoad]:
    return [load.load_of(r, TOPOLOGY) for r in records]


def fitted(records: list[StepRecord]) -> tuple[float, float]:
    model = cost.fit(loads(records))
    return model.fixed_ms, model.ms_per_row


def test_the_fit_finds_the_machine_that_made_the_times() -> None:
    assert fitted(MIXED) == pytest.approx((FIXED_MS, MS_PER_ROW))


def test_rows_without_variance_are_charged_all_the_time() -> None:
    fixed_ms, ms_per_row = fitted([record(SKEWED)] * 3)
    assert fixed_ms == 0.0
    assert 4800 * ms_per_row == pytest.approx(FIXED_MS + 4800 * MS_PER_ROW)


def test_a_compile_in_the_first_passes_leaves_no_trace() -> None:
    compiled = [replace(r, experts_ms_L=100.0 * r.experts_ms_L) for r in MIXED[:2]]
    assert fitted(compiled + MIXED + MIXED) == pytest.approx((FIXED_MS, MS_PER_ROW))


def test_an_old_machine_is_forgotten() -> None:
    slower = [replace(r, experts_ms_L=2.0 * r.experts_ms_L) for r in MIXED]
    assert fitted(MIXED + slower * 16) == pytest.approx((2 * FIXED_MS, 2 * MS_PER_ROW))
    assert fitted(MIXED * 8 + slower * 8)[1] > 1.75 * MS_PER_ROW


def test_scaling_times_scales_the_cost() -> None:
    slower = [replace(r, experts_ms_L=3.0 * r.experts_ms_L) for r in MIXED]
    assert fitted(slower) == pytest.approx(tuple(3.0 * c for c in fitted(MIXED)))


def test_a_cost_never_falls_with_rows() -> None:
    times = [np.full(2, 5.0), np.full(2, 4.0)]
    odd = [replace(r, experts_ms_L=t) for r, t in zip(MIXED[:2], times, strict=True)]
    assert fitted(odd)[0] == 0.0
    assert fitted(odd)[1] > 0.0


def test_layers_whose_time_is_not_known_are_left_out() -> None:
    half = [replace(r, experts_ms_L=r.experts_ms_L * np.array([1.0, 0.0])) for r in MIXED]
    nans = [replace(r, experts_ms_L=r.experts_ms_L * np.array([1.0, np.nan])) for r in MIXED]
    assert fitted(half) == fitted(nans) == pytest.approx((FIXED_MS, MS_PER_ROW))


def test_nothing_measured_is_no_cost_and_no_share() -> None:
    unknown = loads([without_times(r) for r in MIXED])
    model = cost.fit(unknown)
    assert model == cost.fit([]) == cost.CostModel(fixed_ms=0.0, ms_per_row=0.0)
    assert cost.step_times(unknown, model).moe_share == 0.0


def test_the_moe_share_is_the_slowest_ranks_experts_over_the_step() -> None:
    past = loads(MIXED)
    moe_ms = sum(2 * (FIXED_MS + MS_PER_ROW * p.rows_LR.max()) for p in past)
    share = moe_ms / sum(p.record.step_ms - p.record.balance_ms for p in past)
    assert cost.step_times(past, cost.fit(past)).moe_share == pytest.approx(share)


def test_a_lever_that_works_does_not_hide_what_it_saves() -> None:
    model = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
    plain = cost.step_times(loads([record(SKEWED)]), model)
    dropped = loads([record(SKEWED, policy=Policy(epoch=0, lever=Lever.DROP))])
    assert dropped[0].record.step_ms < record(SKEWED).step_ms
    assert cost.step_times(dropped, model).base_ms == pytest.approx(plain.base_ms)


def test_a_step_that_stalled_is_left_out_of_the_share() -> None:
    model = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
    steps = [record(SKEWED)] * 3
    stalled = [*steps, replace(record(SKEWED), step_ms=5000.0)]
    nan = [*steps, replace(record(SKEWED), step_ms=float("nan"))]
    clean = cost.step_times(loads(steps), model)
    assert cost.step_times(loads(stalled), model).moe_share == pytest.approx(clean.moe_share)
    assert cost.step_times(loads(nan), model).moe_share == pytest.approx(clean.moe_share)
