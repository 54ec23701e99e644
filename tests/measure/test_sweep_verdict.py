"""The sweep's verdict: who sets a layer's time, and whether the cost model chooses as measured."""

from __future__ import annotations

import pytest

from benchmarks.gpu.sweep_verdict import Cell, agrees, cost_of, forecast, held_out, learned, report
from sglang_moelb.controller.low_cost import LowCost

NS_A_ROW = 14.0


def cell(tokens: int, skew: float, low_cost: float) -> Cell:
    """A device on which a row costs 14 ns, and at low precision `low_cost` times that."""
    high = tokens * skew * 32 * NS_A_ROW / 1e3
    other = tokens * (4 - skew) / 3 * 32 * NS_A_ROW / 1e3
    low = {f"low_{way}": high * low_cost for way in ("device", "synced")}
    return Cell(
        tokens_per_expert=tokens,
        skew=skew,
        num_ranks=4,
        num_experts=32,
        hot_us={"high_device": high, "high_synced": high, "low_exposed": high * low_cost + 400}
        | low,
        other_us={"high_device": other, "high_synced": other},
    )


def test_the_layer_waits_for_the_slowest_rank_with_the_lever_and_without() -> None:
    assert cell(1024, 2.0, 0.7).saved("synced") == pytest.approx(0.3)
    # At skew 1.2 the other ranks have 0.93 of the mean, so no more than that can be saved.
    assert cell(1024, 1.2, 0.7).saved("synced") == pytest.approx(1 - 0.9333 / 1.2, abs=1e-3)
    assert cell(64, 2.0, 1.3).saved("synced") == pytest.approx(-0.3)
    assert cell(64, 2.0, 0.7).saved("exposed") < 0


def test_the_model_learns_a_break_even_that_its_prior_has_wrong() -> None:
    """The prior expects gains only above 512 rows an expert; this device gains only below."""
    cells = [cell(n, s, 0.7 if n * s < 1024 else 1.2) for n in (128, 256, 2048) for s in (2.0, 3.0)]
    cost = cost_of(cells)
    model = learned(cells, cost, "synced")
    right = [agrees(c.saved("synced"), forecast(c, model, cost)) for c in cells]
    before = [agrees(c.saved("synced"), forecast(c, LowCost(), cost)) for c in cells]
    assert all(right)
    assert not any(before[:2])
    assert not any(before[4:])


def test_a_cell_is_scored_by_a_model_that_has_not_seen_it() -> None:
    cells = [cell(n, 2.0, 0.7 if n < 1024 else 1.2) for n in (128, 512, 4096)]
    cost = cost_of(cells)
    for one, model in zip(cells, held_out(cells, cost, "synced"), strict=True):
        rows_LR = one.rows_R()[None]
        prior = forecast(one, LowCost(), cost)
        assert forecast(one, model, cost) == prior, "no other cell has as many rows an expert"
        assert rows_LR.argmax() != 0, "the leader is not the hot rank"
        assert forecast(one, learned(cells, cost, "synced"), cost) != prior


def test_a_saving_below_one_percent_forgives_either_choice() -> None:
    assert agrees(0.009, -0.5)
    assert agrees(-0.009, 0.5)
    assert not agrees(0.02, 0.0)
    assert not agrees(-0.02, 0.1)


def test_the_report_names_the_cells_in_which_a_model_is_wrong() -> None:
    text = report([cell(2048, 3.0, 0.7), cell(2048, 2.0, 1.2)])
    assert "synced: prior chooses right in 1 of 2 cells, not in 2048/2" in text
    assert "| 2048 | 3 |" in text
