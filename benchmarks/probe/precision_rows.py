"""Rows of what low precision costs, from evaluations, and their table. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.probe.result import GROUPS, Evaluation

CLAIM_POINTS = 1.0  # ReaLB, arXiv 2604.19503: accuracy falls by at most so much


def rows_of(found: Evaluation) -> Iterator[dict[str, Any]]:
    """One row for all items, for those with images and for those of text alone."""
    compared = {row.name: row for row in found.comparison}
    for accuracy in found.accuracy:
        if accuracy.name not in GROUPS:
            continue
        row: dict[str, Any] = {
            "group": accuracy.name,
            "num_items": accuracy.num_items,
            "accuracy": accuracy.accuracy,
            "interval": list(accuracy.interval),
        }
        if pair := compared.get(accuracy.name):
            row |= {
                "difference": pair.difference.value,
                "difference_interval": list(pair.difference.interval),
                "num_lost": pair.num_lost,
                "num_won": pair.num_won,
                "agreement": pair.agreement.value,
            }
            if pair.logprob_distance is not None:
                distance = pair.logprob_distance
                row |= {
                    "distance": distance.value,
                    "distance_interval": list(distance.interval),
                }
        yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; accuracies and their differences in percent and points, distances in nats."""
    lines = [
        "| format | way | lever | rows low | items | right | difference to off | answers equal "
        "| distance of log-probabilities |",
        "| --- | --- | --- | ---: | --- | --- | --- | ---: | --- |",
    ]
    for row in rows:
        columns = [row["format"], row["way"], row["setting"], f"{row['low_share']:.0%}"]
        columns.append(f"{row['group']} ({row['num_items']})")
        columns.append(f"{row['accuracy']:.1%} ({_percent(row['interval'])})")
        if "difference" in row:
            interval = ", ".join(f"{100 * x:+.2f}" for x in row["difference_interval"])
            columns.append(f"{100 * row['difference']:+.2f} ({interval})")
            # Forced answers are the right ones whatever the lever does.
            columns.append(f"{row['agreement']:.1%}" if row["way"] == "served" else "")
            columns.append(_distance(row))
        else:
            columns += ["", "", ""]
        lines.append(f"| {' | '.join(columns)} |")
    lowered = [r for r in rows if r["group"] == "all" and not r["setting"].startswith("off")]
    worst = min(lowered, key=lambda row: float(row["difference_interval"][0]), default=None)
    if worst is not None:
        lines += ["", _verdict(worst)]
    return "\n".join(lines)


def _verdict(worst: dict[str, Any]) -> str:
    low = -100 * worst["difference_interval"][0]
    holds = "within" if low <= CLAIM_POINTS else "not within"
    where = f"{worst['format']} {worst['way']}, {worst['setting']}"
    return (
        f"The furthest that all items may have fallen (95 %) is {low:.2f} points, under {where}: "
        f"{holds} ReaLB's {CLAIM_POINTS:g} point."
    )


def _percent(interval: Sequence[float]) -> str:
    return " to ".join(f"{100 * x:.1f}" for x in interval)


def _distance(row: dict[str, Any]) -> str:
    if "distance" not in row:
        return ""
    interval = " to ".join(f"{x:.2g}" for x in row["distance_interval"])
    return f"{row['distance']:.2g} ({interval})"
