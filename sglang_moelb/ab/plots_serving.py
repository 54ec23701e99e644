"""The plots that compare arms: latency, throughput, distance of answers and right answers.

Each function takes an empty figure and fills it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sglang_moelb.ab.agreement import compare
from sglang_moelb.ab.result import Result
from sglang_moelb.ab.theme import SERIES
from sglang_moelb.ab.types import ArmRun
from sglang_moelb.ab.wording import accuracy_of

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def latency_distributions(figure: Figure, runs: Sequence[ArmRun]) -> None:
    """Share of requests done within a time, for TTFT and end to end; image and text apart."""
    grid = figure.subplots(2, 2, sharey=True, sharex="row")
    measures = (("ttft_ms", "time to first token, s"), ("latency_ms", "end to end, s"))
    for row, (name, label) in zip(grid, measures, strict=True):
        for axes, kind in zip(row, ("image", "text"), strict=True):
            for run, colour in zip(runs, _cycle(SERIES, runs), strict=True):
                values_s = sorted(
                    getattr(o, name) / 1e3 for o in run.outcomes if o.kind == kind and not o.error
                )
                if values_s:
                    share = np.arange(1, len(values_s) + 1) / len(values_s) * 100
                    axes.step(
                        values_s, share, where="post", color=colour, lw=1.8, label=run.arm.name
                    )
            axes.set(title=f"{kind} requests", xlabel=label, ylim=(0, 103))
            axes.set_xlim(left=0)
        row[0].set_ylabel("requests done, %")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if not handles:
        handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)


def throughput_of_rounds(figure: Figure, runs: Sequence[ArmRun]) -> None:
    """Output tokens a second of every round: one point a round, so that the spread is seen."""
    axes = figure.add_subplot()
    marks = zip(runs, _cycle(SERIES, runs), _cycle(MARKERS, runs), strict=True)
    for at, (run, colour, marker) in enumerate(marks):
        walls_s = {r.round: r.wall_s for session in run.sessions for r in session.rounds}
        rates = [
            sum(o.num_output_tokens for o in run.outcomes if o.round == round_) / wall_s
            for round_, wall_s in walls_s.items()
        ]
        if rates:
            axes.hlines(at, min(rates), max(rates), color=colour, lw=1.5, alpha=0.6)
            axes.plot(rates, np.full(len(rates), at), marker, color=colour, ms=8, alpha=0.85)
    axes.set_yticks(np.arange(len(runs)), [run.arm.name for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("output tokens a second, one point a round")
    axes.grid(axis="y", visible=False)


def distances(figure: Figure, base: ArmRun, others: Sequence[ArmRun]) -> None:
    """Distribution of the log-probability differences to the first arm, on a logarithmic axis."""
    axes = figure.add_subplot()
    theirs = {(o.round, o.request_id): o for o in base.outcomes if not o.error}
    for run, colour in zip(others, _cycle(SERIES[1:], others), strict=True):
        values = [
            max(value, 1e-9)
            for o in run.outcomes
            if not o.error and (o.round, o.request_id) in theirs
            for value in compare(theirs[o.round, o.request_id], o).differences
        ]
        if values:
            share = np.arange(1, len(values) + 1) / len(values) * 100
            axes.step(sorted(values), share, where="post", color=colour, lw=1.9, label=run.arm.name)
    axes.set_xscale("log")
    axes.set(
        xlabel=f"|difference| of log-probability to {base.arm.name}, nats (1e-9: equal)",
        ylabel="tokens within, %",
        ylim=(0, 103),
    )
    axes.legend(loc="lower right")


def accuracy_by_name(figure: Figure, result: Result, names: Sequence[str]) -> None:
    """Share of right answers with its interval: a row a name, in it a mark an arm."""
    axes = figure.add_subplot()
    arms = result.arms
    marks = zip(arms, _cycle(SERIES, arms), _cycle(MARKERS, arms), strict=True)
    for i, (arm, colour, marker) in enumerate(marks):
        offset = ((i + 0.5) / len(arms) - 0.5) * 0.6
        for at, name in enumerate(names):
            row = accuracy_of(result, arm.name, name)
            if row is not None:
                low, high = (bound * 100 for bound in row.accuracy.interval)
                axes.hlines(at + offset, low, high, color=colour, lw=1.5)
                axes.plot(row.accuracy.value * 100, at + offset, marker, color=colour, ms=5.5)
        axes.plot([], [], marker, color=colour, label=arm.name)
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(right=101)
    axes.set_xlabel("right answers, %")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4)


def _cycle(values: Sequence[str], runs: Sequence[object]) -> list[str]:
    return [values[i % len(values)] for i in range(len(runs))]
