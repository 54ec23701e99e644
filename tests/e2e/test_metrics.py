"""`/metrics` of a server under load has every metric of the table beside SGLang's own."""

from __future__ import annotations

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from sglang_moelb.metrics import labels
from sglang_moelb.metrics.table import METRICS
from sglang_moelb.types import Topology

from .conftest import Serve, Server
from .talk import (
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_RANKS,
    TEXT,
    TOPK,
    call,
    change,
    observed,
    say,
    status,
    until,
)

pytestmark = pytest.mark.e2e

TOPOLOGY = Topology(
    num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=NUM_RANKS, topk=TOPK
)


def scrape(server: Server) -> dict[str, Family]:
    code, text = call(server, "/metrics")
    assert code == 200, text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Family], name: str) -> float:
    """Sum over the labels of a metric."""
    return sum(sample.value for sample in families[name].samples)


def test_every_metric_is_served_with_bounded_labels_beside_sglangs_own(serve: Serve) -> None:
    server = observed(serve)
    say(server, TEXT)
    until(lambda: "moelb_layer_balancedness" in scrape(server))
    families = scrape(server)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind, metric.name
        assert family.documentation == metric.meaning
        assert family.samples, metric.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
            for label in metric.labels:
                assert sample.labels[label] in labels.values(label, TOPOLOGY), sample
        assert len(family.samples) <= metric.num_series(TOPOLOGY), metric.name
        if "layer" in metric.labels or "rank" in metric.labels:
            assert len(family.samples) == metric.num_series(TOPOLOGY), metric.name
    assert {name for name in families if name.startswith("moelb_")} == {
        metric.name.removesuffix("_total") for metric in METRICS
    }
    assert any(name.startswith("sglang:") for name in families)
    (state,) = (s for s in families["moelb_controller_state"].samples if s.value == 1)
    assert state.labels == {"state": "running"}


def test_metrics_count_what_the_status_counts(serve: Serve) -> None:
    server = observed(serve)
    before = scrape(server)
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    say(server, TEXT)

    def agree() -> bool:
        totals = status(server)["totals"]["num_passes_by_lever"]
        passes = scrape(server)["moelb_passes"].samples
        return {sample.labels["lever"]: sample.value for sample in passes} == totals

    until(agree)
    after = scrape(server)
    for name in (
        "moelb_lost_gate_mass", "moelb_dropped_rows", "moelb_own_time_seconds",
        "moelb_saved_seconds",
    ):
        assert value(after, name) > value(before, name), name
    (mode,) = (s for s in after["moelb_mode"].samples if s.value == 1)
    assert mode.labels == {"mode": "drop"}
    assert value(after, "moelb_policy_epoch") == status(server)["policy"]["epoch"]
