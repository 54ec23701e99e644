"""Write dashboards/moelb.json, the Grafana board: `python scripts/make_board.py`.

Classic dashboard JSON, which Grafana imports and provisions from files. One screen of 1920 x 1080:
a row of single figures, then a row of panels for each question.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "dashboards" / "moelb.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA_VERSION = 41
WIDTH = 24
STAT_HEIGHT, PANEL_HEIGHT = 4, 5
ACTED = 'lever!="none"'
RATE = "[$__rate_interval]"
GREEN, ORANGE, RED = "green", "orange", "red"


def of(name: str, *selectors: str) -> str:
    """A metric of the servers chosen on the board."""
    chosen = ", ".join(['instance=~"$instance"', *selectors])
    return f"{name}{{{chosen}}}"


def rate(name: str, *selectors: str) -> str:
    """Its increase a second."""
    return f"rate({of(name, *selectors)}{RATE})"


def share(part: str, whole: str) -> str:
    """A ratio that is 0 where there is nothing to share."""
    return f"sum({part}) / (sum({whole}) > 0) or vector(0)"


def mean_balance(when: str) -> str:
    """Mean of what prefill passes had."""
    labels = f'when="{when}"'
    total = rate("moelb_pass_balancedness_sum", labels)
    return f"sum({total}) / sum({rate('moelb_pass_balancedness_count', labels)})"


def quantile(of_all: float, name: str, *selectors: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({of_all}, sum by (le) ({rate(f'{name}_bucket', *selectors)}))"


STEP = rate("moelb_step_seconds_total")
SAVED = rate("moelb_saved_seconds_total")
OWN = rate("moelb_own_time_seconds_sum")
BUSIEST = {
    when: rate("moelb_busiest_rank_rows_total", f'when="{when}"') for when in ("before", "after")
}
GAIN = f"(sum({SAVED}) - sum({OWN})) / (sum({STEP}) + sum({SAVED}) > 0) or vector(0)"

# Title, query, unit, thresholds (value, colour) after the base colour; what it says.
Stat = tuple[str, str, str, list[tuple[float | None, str]], str]
STATS: list[Stat] = [
    ("Controller", f"{of('moelb_controller_state')} == 1", "name:state", [(None, GREEN)],
     "Alive? running, or dead or hung: then all passes go without a lever."),
    ("Mode", f"{of('moelb_mode')} == 1", "name:mode", [(None, "blue")], "What the user allows."),
    ("Lever", f"{of('moelb_policy_lever')} == 1", "name:lever", [(None, "blue")],
     "The lever of the policy in force."),
    ("Passes with a lever",
     share(rate("moelb_passes_total", ACTED), rate("moelb_passes_total")), "percentunit",
     [(None, "blue")], "Share of prefill passes in which a lever acted."),
    ("Rows spared",
     f"1 - sum({BUSIEST['after']}) / (sum({BUSIEST['before']}) > 0) or vector(0)", "percentunit",
     [(None, "text"), (0.02, GREEN)],
     "Share of the busiest ranks' rows that levers took from them. Counted, not modelled."),
    ("Net gain", GAIN, "percentunit", [(None, RED), (0.0, "text"), (0.01, GREEN)],
     "Step time saved by spared rows, less own time. Rows are counted, the time of a row fitted."),
    ("Budget spent",
     f"max({of('moelb_quality_spent_ratio')}) / (max({of('moelb_quality_budget_ratio')}) > 0)"
     " or vector(0)", "percentunit", [(None, GREEN), (0.8, ORANGE), (1.0, RED)],
     "Gate mass lost over the quality window, as a share of what may be lost."),
    ("Trace", f"{of('moelb_trace_state')} == 1", "name:trace}} {{trace_state", [(None, "blue")],
     "Of passes and of tokens. Stopped: a full disk, or see the log."),
]  # fmt: skip

# Title, what it says, unit, queries with their legends, stacked.
Panel = tuple[str, str, str, list[tuple[str, str]], bool]
PANELS: list[Panel] = [
    ("Helps: balance of passes", "max/mean rows of ranks, mean over layers; 1 is perfect.", "none",
     [(mean_balance("before"), "before"), (mean_balance("after"), "after"),
      (quantile(0.95, "moelb_pass_balancedness", 'when="after"'), "after, p95")], False),
    ("Helps: balance of layers", "Of the last pass: the worst layer, and the mean of all.", "none",
     [(f"max by (when) ({of('moelb_layer_balancedness')})", "worst, {{when}}"),
      (f"avg by (when) ({of('moelb_layer_balancedness')})", "mean, {{when}}")], False),
    ("Helps: rows of ranks", "Of the last pass, all layers. Levers bring the maximum down.",
     "short", [(f"max by (when) ({of('moelb_rank_rows')})", "busiest, {{when}}"),
               (f"avg by (when) ({of('moelb_rank_rows')})", "mean, {{when}}")], False),
    ("Helps: measured gain, and own time", "Shares of step time.", "percentunit",
     [(share(SAVED, STEP), "saved"), (share(OWN, STEP), "own time"), (GAIN, "net")], False),
    ("Does: passes by lever", "Prefill passes a second.", "short",
     [(f"sum by (lever) ({rate('moelb_passes_total')})", "{{lever}}")], True),
    ("Does: time of 1,000 tokens", "Step time on rank 0. Compare levers under like loads only.",
     "s", [(f"1000 * sum by (lever) ({STEP}) / sum by (lever) ({rate('moelb_tokens_total')})",
            "{{lever}}")], False),
    ("Does: gate mass", "Lost and moved, of what was routed under a lever.", "percentunit",
     [(share(rate(f"moelb_{what}_gate_mass_total"), rate("moelb_routed_gate_mass_total")), what)
      for what in ("lost", "moved")], False),
    ("Does: quality", "Lossy levers stop at the budget and resume at 80 % of it.", "percentunit",
     [(f"max({of('moelb_quality_spent_ratio')})", "spent"),
      (f"max({of('moelb_quality_budget_ratio')})", "budget")], False),
    ("Why: decisions", "Lever and class of the reason; the status has the sentence.", "short",
     [(f"sum by (lever, reason) ({rate('moelb_decisions_total')}) > 0", "{{lever}}: {{reason}}")],
     True),
    ("Why: lever left unused", "Passes a second in which the gate was closed.", "short",
     [(f"sum by (lever, gate) ({rate('moelb_gated_passes_total')}) > 0", "{{lever}}: {{gate}}")],
     True),
    ("Why: forecast", "Share of a step saved, and of gate mass lost.", "percentunit",
     [(f"max by (lever) ({of('moelb_predicted_gain_ratio', ACTED)})", "{{lever}} saves"),
      (f"max by (lever) ({of('moelb_predicted_loss_ratio', ACTED)})", "{{lever}} loses")], False),
    ("Why: what there is to gain", "Experts' share of a step, and trust in the estimate.",
     "percentunit", [(f"max({of('moelb_moe_time_ratio')})", "experts of the busiest rank"),
                     (f"max({of('moelb_confidence_ratio')})", "confidence")], False),
    ("Alive: own time of a pass", "Observe, exchange, plan and apply.", "s",
     [(quantile(0.5, "moelb_own_time_seconds"), "p50"),
      (quantile(0.99, "moelb_own_time_seconds"), "p99")], False),
    ("Alive: age of the last pass", "Since the controller read one; grows while nothing is asked.",
     "s", [(f"time() - max({of('moelb_controller_last_pass_timestamp_seconds')})", "age")], False),
    ("Alive: stalls", "In five minutes.", "short",
     [(f"sum by (kind) (increase({of('moelb_stalls_total')}[5m]))", "{{kind}}")], True),
    ("Alive: trace", "Bytes written a second, and passes a second that were or were not.", "short",
     [(f"sum by (trace) ({rate('moelb_trace_bytes_total')})", "{{trace}}, bytes"),
      (f"sum by (trace) ({rate('moelb_trace_passes_total')})", "{{trace}}, passes"),
      (f"sum by (trace) ({rate('moelb_trace_missed_passes_total')})", "{{trace}}, missed")], False),
]  # fmt: skip


def target(expr: str, legend: str, index: int, *, instant: bool) -> dict[str, Any]:
    """One query of a panel."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expr,
        "instant": instant,
        "range": not instant,
        "legendFormat": legend,
        "refId": "ABCDEFGH"[index],
    }


def panel(number: int, kind: str, title: str, says: str, place: tuple[int, ...]) -> dict[str, Any]:
    """What all panels have."""
    x, y, width, height = place
    return {
        "id": number,
        "type": kind,
        "title": title,
        "description": says,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
    }


def stat(number: int, one: Stat) -> dict[str, Any]:
    """A single figure, or the name of the series that is 1."""
    title, expr, unit, steps, says = one
    by_name = unit.startswith("name:")
    legend = f"{{{{{unit.partition(':')[2]}}}}}" if by_name else ""
    width = WIDTH // len(STATS)
    made = panel(number, "stat", title, says, ((number - 1) * width, 0, width, STAT_HEIGHT))
    made["targets"] = [target(expr, legend, 0, instant=True)]
    made["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "name" if by_name else "value",
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
    }
    thresholds = [{"value": value, "color": colour} for value, colour in steps]
    made["fieldConfig"] = {
        "defaults": {
            "unit": "none" if by_name else unit,
            "noValue": "-",
            "color": {"mode": "thresholds"},
            "thresholds": {"mode": "absolute", "steps": thresholds},
        },
        "overrides": [_alarm(name) for name in ("dead", "hung", "stopped")] if by_name else [],
    }
    return made


def _alarm(series: str) -> dict[str, Any]:
    """Paint series whose name ends in this word red."""
    return {
        "matcher": {"id": "byRegexp", "options": f"/{series}$/"},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": RED}}],
    }


def timeseries(number: int, one: Panel) -> dict[str, Any]:
    """Lines over time."""
    title, says, unit, queries, stacked = one
    column, row = (number - len(STATS) - 1) % 4, (number - len(STATS) - 1) // 4
    place = (column * WIDTH // 4, STAT_HEIGHT + row * PANEL_HEIGHT, WIDTH // 4, PANEL_HEIGHT)
    made = panel(number, "timeseries", title, says, place)
    made["targets"] = [
        target(expr, legend, i, instant=False) for i, (expr, legend) in enumerate(queries)
    ]
    made["options"] = {
        "legend": {"displayMode": "list", "placement": "right", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    defaults = {"unit": unit, "color": {"mode": "palette-classic"}, "custom": custom}
    made["fieldConfig"] = {"defaults": defaults, "overrides": []}
    return made


def board() -> dict[str, Any]:
    """The whole board."""
    stats = [stat(i, one) for i, one in enumerate(STATS, 1)]
    panels = [timeseries(i, one) for i, one in enumerate(PANELS, len(STATS) + 1)]
    servers = "label_values(moelb_controller_state, instance)"
    return {
        "uid": "sglang-moelb",
        "title": "SGLang MoE load balancing (moelb)",
        "description": "Does it help, what does it do, why, is it alive.",
        "tags": ["sglang", "moelb"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "refresh": 1,
                },
                {
                    "name": "instance",
                    "label": "Server",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "definition": servers,
                    "query": {"query": servers, "refId": "servers"},
                    "refresh": 2,
                    "sort": 1,
                    "includeAll": False,
                    "multi": False,
                },
            ]
        },
        "panels": stats + panels,
    }


def text() -> str:
    """The file as it is written."""
    return json.dumps(board(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
