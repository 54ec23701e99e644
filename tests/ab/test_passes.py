from __future__ import annotations

from typing import Any

import pytest

from sglang_moelb.ab.passes import count_reasons, layer_balances, list_choices, measure_passes
from sglang_moelb.ab.types import (
    Arm,
    ArmRun,
    Observed,
    PassRecord,
    Session,
    Status,
    Totals,
)


def record(step: int, **changes: Any) -> PassRecord:
    values: dict[str, Any] = {
        "step": step,
        "phase": "prefill",
        "lever": "drop",
        "policy_lever": "drop",
        "epoch": 1,
        "reason": "gain 0.05",
        "num_tokens_R": [6, 4],
        "num_vision_tokens_R": [5, 0],
        "balance_before_L": [1.5, 1.1],
        "balance_after_L": [1.2, 1.1],
        "rows_before_R": [60.0, 40.0],
        "rows_after_R": [55.0, 40.0],
        "lost_share": 0.05,
        "step_ms": 30.0,
        "balance_ms": 3.0,
    }
    return PassRecord(**(values | changes))


def arm_run(records: list[PassRecord], first: Totals, last: Totals) -> ArmRun:
    observed = Observed(
        first=Status(active=True, totals=first),
        last=Status(
            active=True,
            mode="auto",
            totals=last,
            config={"controller": {"quality_budget": 0.02}},
        ),
        passes=tuple(records),
        controller_states=("running",),
    )
    session = Session(outcomes=(), rounds=(), observed=observed, start_s=1.0)
    return ArmRun(arm=Arm(name="x"), command=(), sessions=(session,))


def test_a_server_without_the_plugin_has_no_passes() -> None:
    session = Session(outcomes=(), rounds=(), observed=None, start_s=1.0)
    assert measure_passes(ArmRun(arm=Arm(name="x"), command=(), sessions=(session,))) is None


def test_totals_are_those_after_the_warm_up() -> None:
    run = arm_run(
        [record(0)],
        Totals(num_passes=5, routed_mass=100.0, lost_mass=9.0, num_passes_by_lever={"drop": 2}),
        Totals(num_passes=9, routed_mass=300.0, lost_mass=11.0, num_passes_by_lever={"drop": 5}),
    )
    passes = measure_passes(run)
    assert passes is not None
    assert (passes.num_passes, passes.num_by_lever) == (4, {"drop": 3})
    assert passes.lost_share == pytest.approx(0.01)
    assert passes.quality_budget == 0.02


def test_balance_is_of_prefill_passes_with_tokens() -> None:
    idle = record(1, rows_before_R=[0.0, 0.0], balance_before_L=[1.0, 1.0])
    decode = record(2, phase="decode", balance_before_L=[2.0, 2.0])
    passes = measure_passes(arm_run([record(0), idle, decode], Totals(), Totals()))
    assert passes is not None
    assert passes.balance_before == pytest.approx(1.3)
    assert passes.balance_after == pytest.approx(1.15)
    assert passes.busiest_before == pytest.approx(1.2)
    assert passes.busiest_after == pytest.approx(1.1)  # 55 of a mean of 50 before
    assert passes.vision_token_share == pytest.approx(0.5)
    assert passes.overhead_share == pytest.approx(0.1)
    assert passes.num_by_phase == {"prefill": 2, "decode": 1}


def test_a_gated_pass_is_not_one_in_which_a_lever_acted() -> None:
    gated = record(
        1, lever="none", gate_reason="12 tokens are too few", balance_before_L=[1.9, 1.9]
    )
    passes = measure_passes(arm_run([record(0), gated], Totals(), Totals()))
    assert passes is not None
    assert passes.balance_before_acted == pytest.approx(1.3)
    assert passes.balance_before == pytest.approx((1.3 + 1.9) / 2)


def test_layers_are_apart_and_the_tail_is_shown() -> None:
    rows = layer_balances([record(i, balance_before_L=[1.0 + i / 100, 1.0]) for i in range(101)])
    assert rows[0].before_mean == pytest.approx(1.5)
    assert rows[0].before_p95 == pytest.approx(1.95)
    assert (rows[1].before_mean, rows[1].before_p95) == (1.0, 1.0)


def test_reasons_that_differ_in_numbers_are_one_and_gates_are_their_own() -> None:
    rows = count_reasons(
        [
            record(0, reason="gain 0.05 of 12"),
            record(1, reason="gain 0.07 of 9"),
            record(2, lever="none", gate_reason="decode"),
        ]
    )
    assert [(r.lever, r.used, r.reason, r.num_passes) for r in rows] == [
        ("drop", True, "gain # of #", 2),
        ("drop", False, "decode", 1),
    ]
    assert rows[0].example == "gain 0.07 of 9"


def test_choices_follow_the_epochs() -> None:
    rows = list_choices([record(3), record(4), record(5, epoch=2, policy_lever="none")])
    assert [(row.step, row.epoch, row.lever) for row in rows] == [(3, 1, "drop"), (5, 2, "none")]
