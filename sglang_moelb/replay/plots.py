"""The plots of a replay: balance by layer, balance over time, and what each arm saves and loses.

Each function takes an empty figure and fills it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sglang_moelb.ab.theme import LIGHT, SERIES, render
from sglang_moelb.replay.result import ArmResult, ReplayResult, stretch

STYLES = ("-", "--")


def write_plots(out: Path, result: ReplayResult) -> list[Path]:
    """Write the PNGs to the folder `out`; returns their paths."""
    arms = result.arms
    num_rows = -(-len(arms) // 4)
    drawn = {
        "balance-by-layer.png": (3.2 + 0.2 * num_rows, lambda f: balance_by_layer(f, arms)),
        "balance-over-time.png": (
            3.2 + 0.2 * num_rows,
            lambda f: balance_over_time(f, arms, result.num_prefill_passes),
        ),
        "saved-and-lost.png": (1.4 + 0.3 * len(arms), lambda f: saved_and_lost(f, arms)),
    }
    paths = []
    for name, (height_in, draw) in drawn.items():
        path = out / name
        path.write_bytes(render(LIGHT, height_in, draw))
        paths.append(path)
    return paths


def balance_by_layer(figure: Figure, arms: Sequence[ArmResult]) -> None:
    """Lines of the mean balance of each layer."""
    axes = figure.add_subplot()
    for at, arm in enumerate(arms):
        layers = np.arange(len(arm.balance_by_layer))
        axes.plot(layers, arm.balance_by_layer, marker=".", ms=4, **_line(at, arm))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="MoE layer", ylabel="rows, busiest rank / mean rank")
    figure.legend(loc="outside upper center", ncols=4)


def balance_over_time(figure: Figure, arms: Sequence[ArmResult], num_passes: int) -> None:
    """Lines of the mean balance of each stretch of passes."""
    axes = figure.add_subplot()
    for at, arm in enumerate(arms):
        middles = (np.arange(len(arm.balance_over_time)) + 0.5) * stretch(num_passes)
        axes.plot(middles, arm.balance_over_time, **_line(at, arm))
    axes.set(xlabel="prefill pass, in order", ylabel="rows, busiest rank / mean rank")
    figure.legend(loc="outside upper center", ncols=4)


def saved_and_lost(figure: Figure, arms: Sequence[ArmResult]) -> None:
    """Bars of the predicted step time saved and, beside them, of rows lost."""
    saved, lost = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(arms))
    saved.barh(at, [100 * arm.saved_share for arm in arms], color=SERIES[0])
    lost.barh(at, [100 * arm.lost_row_share for arm in arms], color=SERIES[5])
    saved.set_yticks(at, [arm.name for arm in arms])
    saved.invert_yaxis()
    saved.set(xlabel="predicted step time saved, %")
    lost.set(xlabel="routed rows lost, %")
    for axes in (saved, lost):
        axes.grid(axis="y", visible=False)


def _line(at: int, arm: ArmResult) -> dict[str, Any]:
    return {
        "color": SERIES[at % len(SERIES)],
        "ls": STYLES[at // len(SERIES) % len(STYLES)],
        "lw": 1.6,
        "label": arm.name,
    }
