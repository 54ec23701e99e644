"""The table of metrics, the page made from it, and the bound on what a server exports."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sglang_moelb.metrics import labels
from sglang_moelb.metrics.table import LARGEST, MAX_SERIES, METRICS, QUESTIONS, num_series
from sglang_moelb.types import MODES, Lever, Topology

from .world import ROOT, exported

SMALL = Topology(num_layers=3, num_experts=8, num_ranks=4, topk=2)


@pytest.fixture(scope="module", params=[SMALL, LARGEST], ids=["small", "largest"])
def server(request: pytest.FixtureRequest) -> tuple[Topology, str]:
    topology: Topology = request.param
    return topology, exported(topology.num_layers, topology.num_ranks)


def samples(text: str) -> Iterator[Any]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def test_names_are_unique_and_follow_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"moelb_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        for unit in ("seconds", "bytes"):
            assert (metric.unit == unit) == (unit in metric.name), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name


def test_every_question_is_answered() -> None:
    assert {metric.answers for metric in METRICS} == set(QUESTIONS)


def test_every_label_has_known_values_and_levers_and_modes_are_all_of_them() -> None:
    for metric in METRICS:
        for label in metric.labels:
            assert labels.values(label, SMALL), label
    assert labels.values("lever", SMALL) == tuple(lever.name.lower() for lever in Lever)
    assert labels.values("mode", SMALL) == MODES
    with pytest.raises(KeyError):
        labels.values("request", SMALL)


def test_a_server_exports_the_table_and_nothing_else(server: tuple[Topology, str]) -> None:
    families = {family.name: family for family in text_string_to_metric_families(server[1])}
    assert set(families) == {metric.name.removesuffix("_total") for metric in METRICS}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind, metric.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample


def test_a_server_exports_as_many_series_as_the_table_says_and_no_more_than_the_bound(
    server: tuple[Topology, str],
) -> None:
    topology, text = server
    assert len(list(samples(text))) == num_series(topology) <= MAX_SERIES


def test_the_bound_is_for_256_ranks_and_96_layers() -> None:
    assert (LARGEST.num_ranks, LARGEST.num_layers) == (256, 96)


def test_every_value_of_a_label_is_in_the_table(server: tuple[Topology, str]) -> None:
    topology, text = server
    for sample in samples(text):
        for label, value in sample.labels.items():
            assert label == "le" or value in labels.values(label, topology), sample


def test_the_page_is_what_the_script_writes() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_metrics_docs.py"))
    page: Path = made["PAGE"]
    assert page == ROOT / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == made["page"](), "run scripts/make_metrics_docs.py"
