"""The picture of a placement: load by expert copy and by rank, before and after.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sglang_moelb.ab.theme import LIGHT, SERIES, render
from sglang_moelb.controller.resident_load import instance_rows, rank_rows
from sglang_moelb.placement import LayerPlacement, Placement
from sglang_moelb.types import FloatArray, IntArray

HEIGHT_IN = 5.4


def write_picture(path: Path, placement: Placement, rows_LE: IntArray) -> None:
    """Write the PNG for the traffic `rows_LE`. Raises OSError."""
    path.write_bytes(render(LIGHT, HEIGHT_IN, lambda figure: draw(figure, placement, rows_LE)))


def draw(figure: Figure, placement: Placement, rows_LE: IntArray) -> None:
    """Fill an empty figure: heat of ranks by layer above, sorted loads of copies below."""
    plain = tuple(LayerPlacement() for _ in placement.layers)
    topology = placement.sizes.topology
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    maps = above.subplots(1, 2, sharey=True)
    pairs = ((plain, "before"), (placement.layers, "after"))
    loads = [_over_mean(rank_rows(rows_LE[None], layers, topology)[0]) for layers, _ in pairs]
    largest = max(1.01, *(float(load_LR.max()) for load_LR in loads))
    for axes, load_LR, (_, title) in zip(maps, loads, pairs, strict=True):
        image = axes.imshow(
            load_LR, aspect="auto", cmap="viridis", vmin=2 - largest, vmax=largest,
            interpolation="nearest",
        )  # fmt: skip
        axes.set(title=f"ranks, {title}: worst {load_LR.max():.2f}", xlabel="rank")
        axes.set_xticks(range(topology.num_ranks) if topology.num_ranks <= 16 else [])
        axes.grid(visible=False)
    maps[0].set_ylabel("MoE layer")
    above.colorbar(image, ax=maps, label="rows / mean rank")
    axes = below.subplots()
    for (layers, title), colour in zip(pairs, (SERIES[6], SERIES[0]), strict=True):
        each_LE = _over_mean(instance_rows(rows_LE[None], layers)[0], rows_LE)
        sorted_LE = np.sort(each_LE, axis=1)[:, ::-1]
        places = np.arange(1, sorted_LE.shape[1] + 1)
        axes.plot(places, sorted_LE.mean(axis=0), color=colour, lw=1.8, label=f"{title}, mean")
        axes.fill_between(
            places, sorted_LE.min(axis=0), sorted_LE.max(axis=0), color=colour, alpha=0.2, lw=0
        )
    axes.axhline(1.0, color=LIGHT.grid, lw=1)
    axes.set(
        xlabel="experts of a layer, busiest first (band: all layers)",
        ylabel="rows of a copy / mean expert",
        ylim=(0, None),
    )
    axes.legend()


def _over_mean(rows: FloatArray, of: IntArray | None = None) -> FloatArray:
    """Rows over the mean of each layer, that of `of` if it is given."""
    mean_L1 = (rows if of is None else of).mean(axis=1, keepdims=True)
    over: FloatArray = rows / np.maximum(mean_L1, 1e-9)
    return over
