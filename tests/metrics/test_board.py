"""The Grafana board: what the script writes, on one screen, in panels that every Grafana has."""

from __future__ import annotations

import json
import runpy
from itertools import combinations
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from sglang_moelb.metrics.labels import VALUES
from sglang_moelb.metrics.table import METRICS

from .world import BOARD, ROOT, board_queries

# A row of Grafana's grid is 30 pixels and a gap of 8; 1080 of them hold 24 rows under its own bars.
MAX_ROWS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def board() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(BOARD.read_text(encoding="utf-8"))
    return made


def test_the_board_is_what_the_script_writes() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_board.py"))
    assert made["PATH"] == BOARD
    assert BOARD.read_text(encoding="utf-8") == made["text"](), "run scripts/make_board.py"


def test_the_board_is_one_screen_without_overlaps() -> None:
    cells: list[set[tuple[int, int]]] = []
    for panel in board()["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        assert columns.stop <= 24
        assert rows.stop <= MAX_ROWS, panel["title"]
        cells.append({(x, y) for x in columns for y in rows})
    assert all(not one & other for one, other in combinations(cells, 2))
    assert len(set().union(*cells)) == 24 * MAX_ROWS, "and without holes"


def test_grafanas_own_schema_knows_every_field() -> None:
    """What its decoder does not know is lost on the way there and back."""
    plugins.register_default_plugins()
    given = board()
    kept = json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))
    for variable in given["templating"]["list"]:
        variable.pop("definition", None)  # a text that Grafana shows; its schema leaves it out
    assert fields(given) <= fields(kept), fields(given) - fields(kept)


def fields(value: Any, name: str = "") -> set[tuple[str, str]]:
    """Path and value of every leaf."""
    if isinstance(value, dict):
        return {leaf for key, one in value.items() for leaf in fields(one, f"{name}.{key}")}
    if isinstance(value, list):
        return {leaf for key, one in enumerate(value) for leaf in fields(one, f"{name}[{key}]")}
    return {(name, json.dumps(value))}


def test_every_question_has_its_row() -> None:
    titles = [panel["title"] for panel in board()["panels"]]
    for question in ("Helps:", "Does:", "Why:", "Alive:"):
        assert len([title for title in titles if title.startswith(question)]) == 4
    assert len(set(titles)) == len(titles)


def test_every_panel_asks_the_prometheus_that_is_chosen_about_the_server_that_is() -> None:
    found = board()
    names = {one["name"]: one for one in found["templating"]["list"]}
    assert names["datasource"]["type"] == "datasource"
    assert names["instance"]["datasource"] == DATASOURCE
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in found["panels"]:
        assert panel["datasource"] == DATASOURCE
        assert panel["description"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE
    num_names = sum(query.count("moelb_") for query in board_queries())
    num_chosen = sum(query.count('instance=~"$instance"') for query in board_queries())
    assert num_names == num_chosen


def test_every_label_that_a_query_groups_or_a_legend_shows_is_one() -> None:
    known = {label for metric in METRICS for label in metric.labels} | {"le"}
    assert set(VALUES) <= known
    for panel in board()["panels"]:
        for target in panel["targets"]:
            shown = target["legendFormat"].split("{{")[1:]
            assert {part.partition("}}")[0] for part in shown} <= known, panel["title"]


def test_only_panels_that_every_grafana_has_are_used() -> None:
    assert {panel["type"] for panel in board()["panels"]} == {"stat", "timeseries"}
    assert board()["schemaVersion"] == 41
