"""What a sweep says: the layer with and without the lever, and what the controller would think.

Pure; reads the cells of `bench_sweep`. A layer takes as long as its slowest rank: without the lever
the hot one at high precision, with it the hot one at low precision or the next. The hot rank is not
the leader, and the model that is scored on a cell has learned from all cells but that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_moelb.controller.cost import CostModel
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.controller.rank_times import RankTimes
from sglang_moelb.types import Topology

TIE = 0.01  # a saving below 1 % of the layer, either way, is neither won nor lost
SEEN_LAYERS = 16  # how often the learning model sees each cell
WAYS = ("device", "synced", "exposed")
HOT = 1  # the leader is rank 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One mean load and skew; times in microseconds by variant, `other_us` of a rank not hot."""

    tokens_per_expert: int
    skew: float
    num_ranks: int
    num_experts: int
    hot_us: dict[str, float]
    other_us: dict[str, float]

    @staticmethod
    def of(row: dict[str, Any]) -> Cell:
        """From a line of results."""
        return Cell(**{name: row[name] for name in Cell.__slots__})

    def rows_R(self) -> np.ndarray:
        """Rows of every rank."""
        mean = self.tokens_per_expert * self.num_experts
        other = mean * (self.num_ranks - self.skew) / (self.num_ranks - 1)
        rows_R = np.full(self.num_ranks, other)
        rows_R[HOT] = mean * self.skew
        return rows_R.round().astype(int)

    def saved(self, way: str) -> float:
        """Share of the layer's time that the lever saves; below 0 it costs."""
        clock = "device" if way == "device" else "synced"
        high = self.hot_us[f"high_{clock}"]
        other = self.other_us.get(f"high_{clock}", 0.0)
        return 1.0 - max(self.hot_us[f"low_{way}"], other) / max(high, other)


def cost_of(cells: Sequence[Cell]) -> CostModel:
    """Time of rows at high precision, least squares over hot ranks, as the controller fits it."""
    rows = [cell.rows_R()[HOT] for cell in cells]
    slope, fixed = np.polyfit(rows, [cell.hot_us["high_synced"] / 1e3 for cell in cells], 1)
    if fixed < 0.0:
        ms = np.array([cell.hot_us["high_synced"] / 1e3 for cell in cells])
        return CostModel(fixed_ms=0.0, ms_per_row=float(ms.mean() / np.mean(rows)))
    return CostModel(fixed_ms=float(fixed), ms_per_row=float(slope))


def topology_of(cell: Cell) -> Topology:
    """One layer."""
    return Topology(
        num_layers=1,
        num_experts=cell.num_experts * cell.num_ranks,
        num_ranks=cell.num_ranks,
        topk=8,
    )


def learned(cells: Sequence[Cell], cost: CostModel, way: str) -> LowCost:
    """The controller's model after passes with the measured times of hot ranks at low precision."""
    model = LowCost()
    for _ in range(SEEN_LAYERS):
        for cell in cells:
            rows_LR = cell.rows_R()[None]
            record = SimpleNamespace(
                rows_after_LR=rows_LR, low_rows_LR=_only_hot(rows_LR), num_copies_LR=None
            )
            low_ms = cell.hot_us[f"low_{way}"] / 1e3
            times = RankTimes.of(record, HOT, low_ms)  # type: ignore[arg-type]
            model = model.updated(times, topology_of(cell), cost)
    return model


def held_out(cells: Sequence[Cell], cost: CostModel, way: str) -> list[LowCost]:
    """For each cell the model that has learned from all the others."""
    return [
        learned([other for other in cells if other is not cell], cost, way) for cell in cells
    ]


def _only_hot(rows_LR: np.ndarray) -> np.ndarray:
    low_LR = np.zeros_like(rows_LR)
    low_LR[:, HOT] = rows_LR[:, HOT]
    return low_LR


def forecast(cell: Cell, model: LowCost, cost: CostModel) -> float:
    """Share of the layer's time that the controller expects the lever to save."""
    rows_LR = cell.rows_R()[None]
    left_LR = model.effective(rows_LR, _only_hot(rows_LR), topology_of(cell))
    saved_ms = cost.ms_per_row * (rows_LR.max() - left_LR.max())
    return float(saved_ms / (cost.fixed_ms + cost.ms_per_row * rows_LR.max()))


def agrees(measured: float, expected: float) -> bool:
    """Whether following the forecast is right: a measured tie forgives either choice."""
    return abs(measured) < TIE or (measured > 0) == (expected > 0)


def report(cells: Sequence[Cell]) -> str:
    """Tables by tokens per expert and skew, and how often each model chooses right."""
    ordered = sorted(cells, key=lambda cell: (cell.tokens_per_expert, cell.skew))
    cost = cost_of(ordered)
    lines = [f"high precision: {cost.fixed_ms:.3f} ms + {cost.ms_per_row * 1e6:.2f} ns a row", ""]
    lines += ["| tokens an expert | skew | high, us | low, us (device, synced, exposed) "
              "| layer saved | prior expects | after the other cells |",
              "| ---: | ---: | ---: | --- | --- | ---: | ---: |"]  # fmt: skip
    for cell, model in zip(ordered, held_out(ordered, cost, "synced"), strict=True):
        times = (cell.hot_us["high_synced"], *(cell.hot_us[f"low_{way}"] for way in WAYS))
        high, *low = (f"{us:.0f}" for us in times)
        saved = ", ".join(f"{cell.saved(way):+.1%}" for way in WAYS)
        expected = (f"{forecast(cell, one, cost):+.1%}" for one in (LowCost(), model))
        columns = (f"{cell.tokens_per_expert} | {cell.skew:g}", high, ", ".join(low), saved)
        lines.append(f"| {' | '.join((*columns, *expected))} |")
    lines.append("")
    for way in WAYS:
        priors = [LowCost()] * len(ordered)
        for name, models in (("prior", priors), ("learned", held_out(ordered, cost, way))):
            wrong = [
                f"{cell.tokens_per_expert}/{cell.skew:g}"
                for cell, one in zip(ordered, models, strict=True)
                if not agrees(cell.saved(way), forecast(cell, one, cost))
            ]
            lines.append(
                f"{way}: {name} chooses right in {len(ordered) - len(wrong)} of {len(ordered)} "
                f"cells{', not in ' if wrong else ''}{' '.join(wrong)}"
            )
    return "\n".join(lines)
