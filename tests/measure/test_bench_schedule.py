"""Mode auto against single modes: the best within the budget, needless losses named."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.bench_schedule import PHASES, change_to, print_summary, summary
from benchmarks.gpu.skew_plugin import Load

MS = {"none": 130.0, "replicate": 109.0, "downgrade": 119.0, "expand": 125.0, "drop": 100.0}
LOST = {"drop": 0.3, "expand": 0.01}
BUDGET = 0.05


def block(mode: str, ms: float, lever: str, label: str = "measured") -> dict[str, Any]:
    return {"phase": "text-only", "mode": mode, "label": label, "tokens_per_s": 1e6 / ms,
            "step_ms": [ms, ms], "levers": [lever, lever], "reasons": [f"saves {ms} %"],
            "lost_share": [LOST.get(lever, 0.0)] * 2}  # fmt: skip


def rows_with(auto_ms: float, lever: str) -> list[dict[str, Any]]:
    singles = [block(mode, ms, mode) for mode, ms in MS.items()]
    return [block("auto", 999.0, "drop", "learning"), *singles, block("auto", auto_ms, lever)]


def test_the_best_mode_is_the_fastest_within_the_budget_and_learning_is_not_measured() -> None:
    told = summary(rows_with(109.0, "replicate"), BUDGET)
    assert (told["best"], told["ratio"], told["needless"]) == ("replicate", 1.0, 0)
    assert summary(rows_with(109.0, "replicate"), 0.5)["best"] == "drop"
    assert told["levers"] == {"replicate": 2}
    assert told["learning"] == {"drop": 2}


def test_a_lossy_lever_is_needless_where_the_exact_one_is_within_two_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert summary(rows_with(119.0, "downgrade"), BUDGET)["needless"] == 2
    assert summary(rows_with(100.0, "drop"), BUDGET)["needless"] == 0, "drop is 9 % faster here"
    print_summary(rows_with(119.0, "downgrade"), BUDGET)
    said = capsys.readouterr().out
    assert "auto has 0.916 of its throughput" in said
    assert "NEEDLESS: a lossy lever in 2 passes" in said
    assert "balanced: no full passes" in said


def test_phases_are_loads_and_single_modes_are_not_held_back_by_the_budget() -> None:
    assert [Load.parse(phase.load).vision for phase in PHASES].count(0.9) == 1
    args = type("Args", (), {"quality_budget": BUDGET, "capacity_factor": 1.25})()
    assert change_to("drop", args)["controller"] == {"quality_budget": 1.0}
    assert change_to("auto", args)["controller"] == {"quality_budget": BUDGET}
