"""The alerts, the board's queries and an exposition, judged by Prometheus's own promtool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_moelb.metrics.table import METRICS

from .world import ROOT, board_queries, exported

ALERTS = ROOT / "dashboards" / "alerts.yml"
ALERTS_TEST = Path(__file__).with_name("alerts_test.yml")


@pytest.fixture(scope="module")
def promtool() -> str:
    """Where promtool is; fails where it could have been installed, skips where it could not."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which("promtool", path=folders)
    if found:
        return found
    why = f"no promtool; run: bash scripts/install_promtool.sh {Path(sys.executable).parent}"
    if "CI" not in os.environ and not shutil.which("apt-get"):
        pytest.skip(f"{why} (it needs apt-get, which is not here either)")
    pytest.fail(why)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def cases() -> list[dict[str, Any]]:
    tests = yaml.safe_load(ALERTS_TEST.read_text(encoding="utf-8"))["tests"]
    return [case for test in tests for case in test["alert_rule_test"]]


def run(promtool: str, *arguments: str, text: str = "") -> str:
    """What promtool said; it must have been content."""
    done = subprocess.run(
        [promtool, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def names_in(query: str) -> set[str]:
    """Names of our metrics in a query, without the parts of a histogram."""
    found = set(re.findall(r"\bmoelb_[a-z_]+", query))
    of_histograms = tuple(m.name for m in METRICS if m.kind == "histogram")
    parts = {name + part: name for name in of_histograms for part in ("_bucket", "_sum", "_count")}
    return {parts.get(name, name) for name in found}


def test_alerts_are_valid(promtool: str) -> None:
    assert f"{len(rules())} rules found" in run(promtool, "check", "rules", str(ALERTS))


def test_alerts_fire_when_they_should_and_are_silent_when_not(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", str(ALERTS_TEST))


def test_every_alert_is_tested_both_ways() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for alert in names:
        tested = [bool(case.get("exp_alerts")) for case in cases() if case["alertname"] == alert]
        assert True in tested, alert
        assert tested.count(False) >= 3, f"{alert}: well, idle, and before or just beside it"


def test_an_alert_names_its_runbook_and_the_runbook_names_every_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == "docs/operations.md#alerts"
        assert {"summary", "description"} < set(rule["annotations"])
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_alerts_ask_for_metrics_of_the_table_only() -> None:
    asked = set().union(*(names_in(rule["expr"]) for rule in rules()))
    assert asked <= {metric.name for metric in METRICS}


def test_the_board_asks_for_every_metric_of_the_table_but_those_left_off() -> None:
    asked = set().union(*(names_in(query) for query in board_queries()))
    assert asked == {metric.name for metric in METRICS if not metric.off_board}


def test_the_boards_queries_are_valid(promtool: str, tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "5m") for query in board_queries()]
    recorded = [{"record": f"board:{i}", "expr": query} for i, query in enumerate(queries)]
    path = tmp_path / "board.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": recorded}]}))
    assert f"{len(queries)} rules found" in run(promtool, "check", "rules", str(path))


@pytest.mark.parametrize(("num_layers", "num_ranks"), [(3, 4), (96, 256)])
def test_what_is_exported_is_lint_free(promtool: str, num_layers: int, num_ranks: int) -> None:
    text = exported(num_layers, num_ranks)
    assert "moelb_passes_total" in text
    assert run(promtool, "check", "metrics", text=text) == ""
