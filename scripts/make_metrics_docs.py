"""Write docs/metrics.md from the table of metrics: `python scripts/make_metrics_docs.py`."""

from __future__ import annotations

from pathlib import Path

from sglang_moelb.metrics.labels import VALUES
from sglang_moelb.metrics.table import LARGEST, MAX_SERIES, METRICS, QUESTIONS, num_series
from sglang_moelb.types import Topology

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
SMALLER = Topology(num_layers=48, num_experts=128, num_ranks=4, topk=8)
LABELS = {
    "lever": "a lever",
    "mode": "a mode",
    "state": "of the controller",
    "trace_state": "of a trace",
    "trace": "`passes` is written by `--moelb-trace`, `tokens` by `--moelb-trace-tokens`",
    "kind": "of a stall",
    "when": "before or after the lever",
    "outcome": "of a move of a resident replica",
    "gate": "class of the status's `gate_reason`",
    "reason": "class of the status's `last_decision.reason`, which has the whole sentence",
    "layer": "MoE layers, from 0",
    "rank": "EP ranks, from 0",
}
INTRO = f"""# Metrics

Written by `scripts/make_metrics_docs.py` from `sglang_moelb/metrics/table.py`; do not edit.

With `--enable-metrics`, at `/metrics` beside SGLang's own, from EP rank 0 alone. Only prefill
passes are recorded. Series by layer and by rank are refreshed twice a second, the others with every
pass; a server that has nothing to do keeps its last values. The board `dashboards/moelb.json` and
the alerts `dashboards/alerts.yml` are made of these; [operations.md](operations.md#alerts) says
what to do.

Series are bounded: a server exports at most {MAX_SERIES} with {LARGEST.num_layers} MoE layers and \
{LARGEST.num_ranks} ranks
(in fact {num_series(LARGEST)}; {num_series(SMALLER)} with {SMALLER.num_layers} layers and \
{SMALLER.num_ranks} ranks).
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for question, title in QUESTIONS.items():
        rows = [
            f"| `{m.name}` | {m.kind} | {m.unit or '-'} | {', '.join(m.labels) or '-'} "
            f"| {m.meaning} |"
            for m in METRICS
            if m.answers == question
        ]
        head = "| metric | kind | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n"
        parts.append(f"## {title}\n\n{head}" + "\n".join(rows) + "\n")
    parts.append("## Labels\n\n| label | values | meaning |\n| --- | --- | --- |")
    for label, meaning in LABELS.items():
        parts[-1] += f"\n| {label} | {', '.join(VALUES.get(label, ('a number',)))} | {meaning} |"
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
