"""The plots of one arm's passes: balance per layer, load per rank, levers, weight lost or moved.

Each function takes an empty figure and fills it. Shape letters: P passes, R EP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sglang_moelb.ab.passes import NONE, chosen_lever, prefill_of, used_lever
from sglang_moelb.ab.result import LayerBalance
from sglang_moelb.ab.theme import SERIES, lever_colour
from sglang_moelb.ab.types import PassRecord

MAX_LINES = 8
SMOOTHING_PASSES = 9


def balance_per_layer(figure: Figure, layers: Sequence[LayerBalance]) -> None:
    """Bars of max/mean per layer before and after the lever; the whisker is the 95th percentile."""
    axes = figure.add_subplot()
    at = np.arange(len(layers))
    sides = (
        ("before", SERIES[6], -0.2, [(x.before_mean, x.before_p95) for x in layers]),
        ("after", SERIES[0], 0.2, [(x.after_mean, x.after_p95) for x in layers]),
    )
    for label, colour, offset, values in sides:
        mean, p95 = np.array(values).T
        # Bars stand on 1.0, perfect balance: what is drawn is the excess.
        axes.bar(at + offset, mean - 1, 0.36, bottom=1, color=colour, label=f"{label}, mean")
        axes.vlines(at + offset, mean, np.maximum(mean, p95), color=colour, lw=1.4)
        axes.plot(at + offset, p95, "_", ms=11, mew=1.8, color=colour, label=f"{label}, 95th pct.")
    axes.axhline(1, color=SERIES[2], lw=1.6, label="perfect")
    axes.set(xlabel="MoE layer", ylabel="rows, busiest rank / mean rank")
    axes.set_xticks(at if len(layers) <= 24 else at[:: max(1, len(layers) // 12)])
    axes.set_ylim(bottom=1 - 0.02 * (axes.get_ylim()[1] - 1))
    axes.grid(axis="x", visible=False)
    columns = ("before, mean", "before, 95th pct.", "after, mean", "after, 95th pct.", "perfect")
    _legend_above(figure, axes, 3, columns)


def load_per_rank(figure: Figure, records: Sequence[PassRecord]) -> None:
    """Lines of each rank's rows, before and after the lever, over the prefill passes.

    The unit is the mean rank's rows before the lever, so that dropped rows are seen to go. Points
    are passes, lines their running mean; more than eight ranks are drawn as a band.
    """
    prefill = prefill_of(records)
    before, after = figure.subplots(2, 1, sharex=True, sharey=True)
    mean_P1 = np.array([[np.mean(record.rows_before_R)] for record in prefill])
    for axes, name, title in (
        (before, "rows_before_R", "before the lever"),
        (after, "rows_after_R", "after the lever"),
    ):
        load_PR = np.array([getattr(record, name) for record in prefill]) / mean_P1
        if load_PR.shape[1] <= MAX_LINES:
            _rank_lines(axes, load_PR)
        else:
            _rank_band(axes, load_PR)
        axes.axhline(1, color=SERIES[2], lw=1.2, ls="--")
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    after.set_xlabel("prefill pass, in order")
    figure.supylabel("rows of the rank / mean rank before", fontsize=10.5)
    _legend_above(figure, before, 4)


def levers_over_time(figure: Figure, records: Sequence[PassRecord]) -> None:
    """Strips over the passes: what the policy said, what acted, and the phase of the pass."""
    axes = figure.add_subplot()
    chosen = [chosen_lever(record) for record in records]
    acted = [used_lever(record) for record in records]
    _strip(axes, 1.0, chosen)
    _strip(axes, 0.0, acted)
    prefill = [i for i, record in enumerate(records) if record.phase == "prefill"]
    axes.plot(prefill, np.full(len(prefill), -0.62), "|", ms=7, color=SERIES[3], mew=0.9)
    axes.set_yticks([1.0, 0.0, -0.62], ["chosen", "acted", "prefill"])
    axes.set_ylim(-0.95, 1.45)
    axes.set_xlim(-0.5, max(1, len(records)) - 0.5)
    axes.set_xlabel("pass, in order (prefill and decode)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    names = dict.fromkeys([*chosen, *acted])
    handles = [Patch(color=lever_colour(name), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def weight_lost_and_moved(
    figure: Figure, records: Sequence[PassRecord], budget: float | None
) -> None:
    """Share of routed weight dropped or moved in each pass, in percent, with the budget's line."""
    axes = figure.add_subplot()
    at = np.arange(len(records))
    for name, colour, label in (
        ("lost_share", SERIES[5], "dropped"),
        ("moved_share", SERIES[0], "moved to other experts"),
    ):
        share_P = np.array([getattr(record, name) for record in records]) * 100
        if name == "lost_share" or share_P.any():
            axes.vlines(at, 0, share_P, color=colour, lw=1.1, alpha=0.8, label=f"{label}, a pass")
    lost_P = np.array([record.lost_share for record in records]) * 100
    if lost_P.size:
        running = np.cumsum(lost_P) / (at + 1)
        axes.plot(at, running, color=SERIES[6], lw=1.8, label="dropped, mean so far")
    if budget is not None:
        axes.axhline(budget * 100, color=SERIES[2], ls="--", lw=1.3, label="quality budget (mean)")
    axes.set(xlabel="pass, in order (prefill and decode)", ylabel="routed weight, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(figure, axes, 2)


def _strip(axes: Axes, y: float, names: Sequence[str]) -> None:
    start = 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            height = 0.62 if names[start] != NONE else 0.34
            span = (start - 0.5, i - start)
            axes.broken_barh(
                [span], (y - height / 2, height), facecolors=lever_colour(names[start]), lw=0
            )
            start = i


def _rank_lines(axes: Axes, load_PR: NDArray[np.float64]) -> None:
    at = np.arange(len(load_PR))
    for rank, load_P in enumerate(load_PR.T):
        colour = SERIES[rank % len(SERIES)]
        axes.plot(at, load_P, ".", ms=4, alpha=0.45, color=colour)
        axes.plot(at, _running_mean(load_P), lw=1.9, color=colour, label=f"rank {rank}")


def _rank_band(axes: Axes, load_PR: NDArray[np.float64]) -> None:
    at = np.arange(len(load_PR))
    low_P, high_P = load_PR.min(axis=1), load_PR.max(axis=1)
    axes.fill_between(at, low_P, high_P, color=SERIES[4], alpha=0.35, lw=0, label="all ranks")
    axes.plot(at, _running_mean(high_P), lw=1.9, color=SERIES[5], label="busiest rank")
    axes.plot(at, _running_mean(low_P), lw=1.9, color=SERIES[0], label="idlest rank")


def _running_mean(values_P: NDArray[np.float64]) -> NDArray[np.float64]:
    window = min(SMOOTHING_PASSES, len(values_P))
    kernel = np.ones(window)
    total = np.convolve(values_P, kernel, mode="same")
    return total / np.convolve(np.ones_like(values_P), kernel, mode="same")


def _legend_above(figure: Figure, axes: Axes, num_columns: int, order: Sequence[str] = ()) -> None:
    by_label = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    labels = list(order) or list(by_label)
    handles = [by_label[label] for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=num_columns)
