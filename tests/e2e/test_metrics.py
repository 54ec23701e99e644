"""`/metrics` of a server under load has every metric of the table beside SGLang's own."""

from __future__ import annotations

from typing import get_args

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from sglang_moelb.ep.metrics import METRICS
from sglang_moelb.types import Lever, Phase

from .conftest import Serve, Server
from .talk import NUM_LAYERS, TEXT, call, change, observed, say, status, until

pytestmark = pytest.mark.e2e

BOUNDS = {
    "phase": set(get_args(Phase)),
    "lever": {lever.name.lower() for lever in Lever},
    "layer": {str(layer) for layer in range(NUM_LAYERS)},
}


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
    until(lambda: "moelb_balancedness_after" in scrape(server))
    families = scrape(server)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind, metric.name
        assert family.documentation == metric.meaning
        assert family.samples, metric.name
        for sample in family.samples:
            assert set(sample.labels) == set(metric.labels), sample
            assert all(text in BOUNDS[label] for label, text in sample.labels.items()), sample
        if metric.labels == ("layer",):
            assert {sample.labels["layer"] for sample in family.samples} == BOUNDS["layer"]
    assert {name for name in families if name.startswith("moelb_")} == {
        metric.name.removesuffix("_total") for metric in METRICS
    }
    assert any(name.startswith("sglang:") for name in families)
    assert value(families, "moelb_controller_up") == 1


def test_metrics_count_what_the_status_counts(serve: Serve) -> None:
    server = observed(serve)
    before = scrape(server)
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    say(server, TEXT)

    def agree() -> bool:
        totals = status(server)["totals"]["num_passes_by_lever"]
        passes = scrape(server)["moelb_passes"].samples
        by_lever = dict.fromkeys(totals, 0.0)
        for sample in passes:
            if sample.name == "moelb_passes_total":
                lever = sample.labels["lever"]
                by_lever[lever] = by_lever.get(lever, 0.0) + sample.value
        return by_lever == totals

    until(agree)
    after = scrape(server)
    for name in ("moelb_lost_gate_mass", "moelb_dropped_rows", "moelb_balance_seconds"):
        assert value(after, name) > value(before, name), name
    assert value(after, "moelb_policy_epoch") == status(server)["policy"]["epoch"]
