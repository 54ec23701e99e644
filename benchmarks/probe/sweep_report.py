"""The sweep as a picture and as tables: quality against the load that each lever leaves.

    python -m benchmarks.probe.sweep_report --sweep sweep.json --out docs/probe-levers.png \\
      --full docs/probe-levers.md

Prints the table in Markdown; `--full` writes another one of every setting with its intervals.
Levers are compared at equal remaining load: at an equal capacity factor they leave different loads,
so a comparison there would favour the one that cuts less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sglang_moelb.ab.theme import LIGHT, SERIES, render

Rows = list[dict[str, Any]]

LEVELS = ("device", "expert")
SHOWN = {
    "drop score uniform": ("drop by score", SERIES[0], "-"),
    "drop score image_first": ("drop by score, images first", SERIES[0], "--"),
    "drop score text_first": ("drop by score, text first", SERIES[0], ":"),
    "drop random uniform": ("drop at random", SERIES[1], "-"),
    "drop random image_first": ("drop at random, images first", SERIES[1], "--"),
    "drop order uniform": ("drop by order", SERIES[5], "-"),
    "drop reverse uniform": ("drop by reverse order", SERIES[4], "-"),
    "expand fill": ("expand, fill", SERIES[2], "-"),
    "expand compete": ("expand, compete", SERIES[2], "--"),
    "macs drop": ("MACS, drop", SERIES[3], "-"),
    "macs expand": ("MACS, expand", SERIES[3], "--"),
}
HEIGHT_IN = 8.4
SMALLEST_DISTANCE = 1e-4


def curve(rows: Rows, level: str, setting: str) -> Rows:
    """The rows of one setting by the load they leave."""
    chosen = [r for r in rows if r.get("level") == level and r.get("setting") == setting]
    return sorted(chosen, key=lambda row: float(row["load_mean"]))


def at_load(rows: Rows, level: str, setting: str, load: float, what: str) -> float | None:
    """`what` of a setting where it leaves `load`, on a line between its factors; None beyond.

    Example: accuracies 0.9 at load 1 and 1.0 at load 2 give 0.95 at load 1.5.
    """
    points = curve(rows, level, setting)
    for low, high in pairwise(points):
        if low["load_mean"] <= load <= high["load_mean"]:
            width = high["load_mean"] - low["load_mean"]
            share = (load - low["load_mean"]) / width if width else 0.0
            return float(low[what] + share * (high[what] - low[what]))
    return None


def table(rows: Rows, loads: Sequence[float]) -> str:
    """Markdown: accuracy and lost gate mass in percent at equal loads, one line a setting."""
    settings = dict.fromkeys(row["setting"] for row in rows if "setting" in row)
    head = [f"{level}, load {load:g}" for level in LEVELS for load in loads]
    lines = ["| setting | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]
    for setting in settings:
        cells = []
        for level in LEVELS:
            for load in loads:
                accuracy = at_load(rows, level, setting, load, "accuracy")
                lost = at_load(rows, level, setting, load, "lost_mass_share")
                known = accuracy is not None and lost is not None
                cells.append(f"{100 * accuracy:.1f} ({100 * lost:.0f})" if known else "")
        lines.append(f"| {setting.replace('_', '-')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full_table(rows: Rows) -> str:
    """Markdown: every setting at every factor with 95 % intervals, by level and load left."""
    lines = [
        "# What every setting of the levers cost the probe",
        "",
        "Made by `python -m benchmarks.probe.sweep_report`; what was measured, and how, is in",
        "[probe.md](probe.md). Accuracy in percent, distance of the log-probabilities of the right",
        "tokens in nats, both with 95 % intervals (Wilson; linearised ratio over items); load of",
        "the busiest rank, mean = 1, in the mean and the 95th percentile of layers and passes.",
    ]
    for level in LEVELS:
        lines += [
            "",
            f"## One capacity for each {level}",
            "",
            "| setting | factor | load, mean | load, p95 | gate mass lost, % | accuracy, % "
            "| distance |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        of_level = [row for row in rows if row.get("level") == level]
        for row in sorted(of_level, key=lambda row: (row["setting"], row["factor"])):
            low, high = (100 * end for end in row["accuracy_interval"])
            near, far = row["logprob_distance_interval"]
            lines.append(
                f"| {row['setting'].replace('_', '-')} | {row['factor']:g} "
                f"| {row['load_mean']:.2f} | {row['load_p95']:.2f} "
                f"| {100 * row['lost_mass_share']:.1f} "
                f"| {100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f}) "
                f"| {row['logprob_distance']:.4f} ({max(near, 0.0):.4f} to {far:.4f}) |"
            )
    return "\n".join(lines) + "\n"


def _draw(figure: Figure, rows: Rows, unloaded: float) -> None:
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, level in enumerate(LEVELS):
        accuracy, distance = axes[0][column], axes[1][column]
        for setting, (label, colour, line) in SHOWN.items():
            points = curve(rows, level, setting)
            loads = [p["load_mean"] for p in points]
            style = {"color": colour, "linestyle": line, "linewidth": 1.3, "label": label}
            ends = [
                [abs(p["accuracy"] - p["accuracy_interval"][end]) for p in points] for end in (0, 1)
            ]
            accuracy.errorbar(loads, [p["accuracy"] for p in points], ends, elinewidth=0.6, **style)
            values, bounds = _distances(points)
            distance.errorbar(loads, values, bounds, marker=".", elinewidth=0.6, **style)
        accuracy.set_title(f"one capacity for each {level}")
        distance.set_yscale("log")
        for each in (accuracy, distance):
            _mark(each, unloaded)
    axes[0][0].set_ylabel("accuracy, 95 % intervals")
    axes[1][0].set_ylabel("distance of log-probabilities,\n95 % intervals, 1e-4 or more")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False,
        title="load left on the busiest rank, mean = 1; dotted: without a lever",
    )  # fmt: skip


def _distances(points: Rows) -> tuple[list[float], list[list[float]]]:
    """Distances and how far their intervals reach below and above, cut off where no log reaches."""
    values = [max(p["logprob_distance"], SMALLEST_DISTANCE) for p in points]
    ends = [
        [max(p["logprob_distance_interval"][end], SMALLEST_DISTANCE) for p in points]
        for end in (0, 1)
    ]
    return values, [
        [abs(value - end) for value, end in zip(values, each, strict=True)] for each in ends
    ]


def _mark(axes: Axes, unloaded: float) -> None:
    axes.axvline(unloaded, color="#7F7F7F", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlim(0.5, 2.1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", type=Path, required=True, help="what the sweep wrote")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--full", type=Path, help="the Markdown file of all settings to write")
    parser.add_argument("--loads", default="0.75,1,1.25,1.5", help="loads of the table")
    args = parser.parse_args()
    rows = json.loads(args.sweep.read_text())["rows"]
    # Where a drop drops nothing, the load is that of no lever.
    lossless = [r for r in rows if r.get("lost_mass_share") == 0 and "drop" in r["setting"]]
    if not lossless:
        parser.error(f"--sweep {args.sweep}: no drop without a loss in it; sweep larger factors")
    unloaded = lossless[0]["load_mean"]
    args.out.write_bytes(render(LIGHT, HEIGHT_IN, lambda figure: _draw(figure, rows, unloaded)))
    if args.full:
        args.full.write_text(full_table(rows))
    print(table(rows, [float(load) for load in args.loads.split(",")]))


if __name__ == "__main__":
    main()
