"""What a pass adds to each metric; numbers worked out by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.decide import Standing, decide
from sglang_moelb.controller.load import full_confidence
from sglang_moelb.ep import metrics as fed
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.metrics import Metrics
from sglang_moelb.ep.open_pass import gate_reason
from sglang_moelb.metrics.labels import DECISIONS, GATES, OTHER, decision_class, gate_class
from sglang_moelb.metrics.table import METRICS
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.types import TraceStats
from sglang_moelb.types import Lever, LeverForecast, Phase, Policy, Topology
from tests.trace.world import rich_pass, writer

from .world import CONFIG, Watched, Writing, effects, record, value

TOPOLOGY = Topology(num_layers=3, num_experts=8, num_ranks=4, topk=2)


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics()
    yield made
    for one in made._made.values():
        REGISTRY.unregister(one)


def test_series_with_known_labels_begin_at_zero(metrics: Metrics) -> None:
    assert value("moelb_passes_total", {"lever": "drop"}) == 0
    assert value("moelb_stalls_total", {"kind": "controller"}) == 0
    assert value("moelb_layer_balancedness", {"layer": "0", "when": "after"}) is None


def test_a_pass_under_a_lever_is_counted_by_it(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY, Lever.DROP), effects(TOPOLOGY, Lever.DROP))
    drop = {"lever": "drop"}
    assert value("moelb_passes_total", drop) == 1
    assert value("moelb_tokens_total", drop) == 40
    assert value("moelb_step_seconds_total", drop) == pytest.approx(0.2)
    assert value("moelb_policy_lever", drop) == 1
    assert value("moelb_policy_lever", {"lever": "none"}) == 0
    assert value("moelb_policy_epoch") == 4
    assert value("moelb_own_time_seconds_sum") == pytest.approx(0.004)
    assert value("moelb_routed_gate_mass_total") == 100
    assert value("moelb_lost_gate_mass_total") == 3
    assert value("moelb_moved_gate_mass_total") == 2
    assert value("moelb_dropped_rows_total") == 7
    assert value("moelb_added_rows_total") == 5
    assert value("moelb_quality_spent_ratio") == 0.03
    assert abs(value("moelb_controller_last_pass_timestamp_seconds") - time.time()) < 60


def test_balance_is_told_before_and_after_the_lever(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY, Lever.DROP), effects(TOPOLOGY, Lever.DROP))
    # Ranks have 32, 16, 16 and 16 rows a layer, and 24, 16, 16 and 16 after it.
    for when, balance, rows in (("before", 1.6, 32), ("after", 24 / 18, 24)):
        for layer in range(3):
            found = value("moelb_layer_balancedness", {"layer": str(layer), "when": when})
            assert found == pytest.approx(balance, abs=1e-4)
        labels = {"lever": "drop", "when": when}
        assert value("moelb_pass_balancedness_sum", labels) == pytest.approx(balance, abs=1e-4)
        assert value("moelb_busiest_rank_rows_total", labels) == 3 * rows
        assert value("moelb_rank_rows", {"rank": "0", "when": when}) == 3 * rows
        assert value("moelb_rank_rows", {"rank": "3", "when": when}) == 3 * 16
    assert value("moelb_saved_seconds_total") == pytest.approx(3 * 8 * 0.01 / 1e3)


def test_copies_of_experts_are_counted_and_lose_nothing(metrics: Metrics) -> None:
    copies_LR = np.full((3, 4), 2)
    made = record(TOPOLOGY, Lever.REPLICATE, num_copies_LR=copies_LR)
    metrics.add(made, effects(TOPOLOGY, Lever.REPLICATE))
    assert value("moelb_copied_experts_total") == 24
    assert value("moelb_passes_total", {"lever": "replicate"}) == 1
    assert value("moelb_saved_seconds_total") > 0
    assert value("moelb_lost_gate_mass_total") == 0


def test_a_pass_without_a_lever_saves_and_loses_nothing(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY), effects(TOPOLOGY))
    assert value("moelb_saved_seconds_total") == 0
    assert value("moelb_routed_gate_mass_total") == 0
    assert value("moelb_dropped_rows_total") == 0
    labels = {"lever": "none", "when": "after"}
    assert value("moelb_pass_balancedness_sum", labels) == pytest.approx(1.6)


def test_a_decode_pass_is_not_recorded(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY, phase="decode"), effects(TOPOLOGY))
    assert value("moelb_passes_total", {"lever": "none"}) == 0
    assert value("moelb_own_time_seconds_count") == 0


def test_a_pass_without_rows_is_balanced(metrics: Metrics) -> None:
    one = record(TOPOLOGY)
    empty = replace(one, rows_LEM=one.rows_LEM * 0, rows_after_LR=one.rows_after_LR * 0)
    metrics.add(empty, effects(TOPOLOGY))
    assert value("moelb_layer_balancedness", {"layer": "0", "when": "before"}) == 1.0


def test_a_gated_pass_is_counted_by_the_class_of_its_reason(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY, Lever.DROP, "9 prefill tokens, below min_batch_tokens 100"),
                effects(TOPOLOGY, Lever.DROP))  # fmt: skip
    labels = {"lever": "drop", "gate": "below_min_tokens"}
    assert value("moelb_gated_passes_total", labels) == 1
    assert value("moelb_passes_total", {"lever": "none"}) == 1
    assert value("moelb_passes_total", {"lever": "drop"}) == 0
    assert value("moelb_routed_gate_mass_total") == 0


def test_forecasts_and_trust_are_told(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY), effects(TOPOLOGY, Lever.NONE, "mode none"))
    assert value("moelb_predicted_gain_ratio", {"lever": "drop"}) == pytest.approx(0.2)
    assert value("moelb_predicted_loss_ratio", {"lever": "drop"}) == pytest.approx(0.02)
    assert value("moelb_confidence_ratio") == 0.5
    assert value("moelb_moe_time_ratio") == 0.6
    assert value("moelb_decisions_total", {"lever": "none", "reason": "mode"}) == 1


def test_a_pass_whose_own_time_is_over_a_quarter_is_a_stall(metrics: Metrics) -> None:
    metrics.add(record(TOPOLOGY, balance_ms=50.0), effects(TOPOLOGY))
    assert value("moelb_stalls_total", {"kind": "pass"}) == 0
    metrics.add(record(TOPOLOGY, balance_ms=50.1), effects(TOPOLOGY))
    assert value("moelb_stalls_total", {"kind": "pass"}) == 1


def test_layers_and_ranks_are_refreshed_twice_a_second(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(fed.time, "monotonic", lambda: now_s)
    labels = {"rank": "0", "when": "after"}
    one, other = record(TOPOLOGY), record(TOPOLOGY, Lever.DROP)
    metrics.add(one, effects(TOPOLOGY))
    metrics.add(other, effects(TOPOLOGY))
    assert value("moelb_rank_rows", labels) == 96
    now_s += 0.6
    metrics.add(other, effects(TOPOLOGY))
    assert value("moelb_rank_rows", labels) == 72


def test_the_state_of_the_controller_is_followed(metrics: Metrics) -> None:
    watched = Watched()
    metrics.watch(watched, CONFIG)  # type: ignore[arg-type]
    assert value("moelb_controller_state", {"state": "running"}) == 1
    for state, num_stalls in (("hung", 1), ("running", 1), ("dead", 2)):
        watched.on_state(state)
        assert value("moelb_stalls_total", {"kind": "controller"}) == num_stalls
        for other in ("running", "hung", "dead"):
            assert value("moelb_controller_state", {"state": other}) == (other == state)


def test_the_lever_in_force_is_none_until_the_controller_answers_again(metrics: Metrics) -> None:
    watched, drop = Watched(), {"lever": "drop"}
    metrics.watch(watched, CONFIG)  # type: ignore[arg-type]
    metrics.add(record(TOPOLOGY, Lever.DROP), effects(TOPOLOGY, Lever.DROP))
    assert value("moelb_policy_lever", drop) == 1
    watched.on_state("hung")
    assert value("moelb_policy_lever", drop) == 0
    assert value("moelb_policy_lever", {"lever": "none"}) == 1
    watched.on_state("running")
    metrics.add(record(TOPOLOGY, Lever.DROP), effects(TOPOLOGY, Lever.DROP))
    assert value("moelb_policy_lever", drop) == 1


def test_mode_and_budget_follow_the_configuration(metrics: Metrics) -> None:
    watched = Watched()
    metrics.watch(watched, CONFIG)  # type: ignore[arg-type]
    assert value("moelb_mode", {"mode": "auto"}) == 1
    assert value("moelb_quality_budget_ratio") == 0.04
    watched.on_config(merge(CONFIG, {"mode": "drop", "controller": {"quality_budget": 0.2}}))
    assert value("moelb_mode", {"mode": "drop"}) == 1
    assert value("moelb_mode", {"mode": "auto"}) == 0
    assert value("moelb_quality_budget_ratio") == 0.2


def test_a_trace_is_followed_until_it_stops(metrics: Metrics) -> None:
    writing = Writing()
    metrics.follow("passes", writing)  # type: ignore[arg-type]
    metrics.follow("tokens", None)
    passes = {"trace": "passes"}
    assert value("moelb_trace_bytes_total", passes) == 100
    assert value("moelb_trace_state", {**passes, "trace_state": "running"}) == 1
    assert value("moelb_trace_state", {"trace": "tokens", "trace_state": "off"}) == 1
    writing.stats = TraceStats(state="stopped", num_bytes=250, num_passes=3, num_missed=2)
    writing.on_written()
    assert value("moelb_trace_bytes_total", passes) == 250
    assert value("moelb_trace_passes_total", passes) == 3
    assert value("moelb_trace_missed_passes_total", passes) == 2
    assert value("moelb_stalls_total", {"kind": "trace"}) == 2
    assert value("moelb_trace_state", {**passes, "trace_state": "stopped"}) == 1
    assert value("moelb_trace_state", {**passes, "trace_state": "running"}) == 0


def test_a_writer_tells_what_it_wrote_and_that_it_stopped(
    metrics: Metrics, tmp_path: Path
) -> None:
    background = BackgroundWriter(writer(tmp_path))
    metrics.follow("passes", background)
    background.add(rich_pass(0))
    background.add(replace(rich_pass(1), rows_LREM=np.zeros((1, 1, 1, 2), dtype=np.int64)))
    background.close()
    passes = {"trace": "passes"}
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert value("moelb_trace_bytes_total", passes) == size
    assert value("moelb_trace_passes_total", passes) == 1
    assert value("moelb_trace_state", {**passes, "trace_state": "stopped"}) == 1


def gate(phase: Phase, num_tokens: int) -> str:
    sizes = Sizes(num_tokens=num_tokens, num_prefill_tokens=num_tokens, phase=phase)
    policy = Policy(epoch=1, lever=Lever.DROP, min_batch_tokens=100)
    return gate_reason(Agreed(policy=policy, sizes_R=(sizes,)))


def test_every_reason_of_the_gate_has_its_class() -> None:
    found = {gate_class(gate("prefill", 9)), gate_class(gate("decode", 200))}
    assert found == set(GATES)
    assert gate_class("of another version") == OTHER


def decisions() -> Iterator[tuple[str, str]]:
    """A lever and a reason of each kind, from the controller itself."""
    base = replace(effects(TOPOLOGY).estimate, num_passes=32, spent_mass_share=0.0)
    base = replace(base, confidence=full_confidence(32))
    pays = LeverForecast(lever=Lever.DROP, balance=1.0, gain=0.2, lost_mass_share=0.01)
    paying = replace(base, forecasts=(pays,))
    lossy = replace(base, forecasts=(replace(pays, lost_mass_share=0.045),))
    useless = replace(base, forecasts=(replace(pays, gain=0.001),))
    auto = merge(Config(), {"mode": "auto"})
    dropping = Standing(lever=Lever.DROP)
    cases: list[tuple[object, Config, Standing]] = [
        (replace(base, num_passes=0), auto, Standing()),
        (replace(base, ms_per_row=0.0), auto, Standing()),
        (replace(base, moe_share=0.0), auto, Standing()),
        (replace(base, confidence=0.0), auto, Standing()),
        (replace(paying, spent_mass_share=0.5), auto, Standing()),
        (paying, merge(auto, {"controller": {"quality_budget": 0.0}}), Standing()),
        (lossy, auto, Standing()),
        (replace(lossy, forecasts=(replace(pays, lost_mass_share=0.2),)), auto, dropping),
        (paying, auto, Standing()),
        (paying, auto, dropping),
        (useless, auto, replace(dropping, dwell_passes=0)),
        (useless, auto, Standing()),
        (replace(base, forecasts=(replace(pays, gain=0.025),)), auto, Standing()),
        (paying, merge(Config(), {"mode": "none"}), Standing()),
        (paying, merge(Config(), {"mode": "drop"}), Standing()),
    ]
    for estimate, config, standing in cases:
        decision, _ = decide(estimate, config, standing)  # type: ignore[arg-type]
        yield decision.lever.name.lower(), decision.reason


def test_every_reason_of_the_controller_has_its_class() -> None:
    found: dict[str, list[str]] = {}
    for lever, reason in decisions():
        found.setdefault(decision_class(lever, reason)[1], []).append(reason)
    assert set(found) == set(DECISIONS), found
    assert decision_class("none", "of another version") == ("none", OTHER)


def test_in_observe_the_lever_is_the_one_that_would_be_chosen() -> None:
    for lever, reason in decisions():
        observed = f"observe only: would choose {lever}, because {reason}"
        assert decision_class("none", observed) == decision_class(lever, reason)
    assert decision_class("none", "observe only: would choose magic, because of it")[0] == "none"


def test_every_metric_is_fed() -> None:
    text = Path(fed.__file__).read_text(encoding="utf-8")
    assert [metric.name for metric in METRICS if f'"{metric.name}"' not in text] == []
