"""The heat map of ranks by layers, with the load of each rank beside it and of each layer below.

Colours and characters say the same, so that the map reads without colours too.

Shape letters: L MoE layers, R ranks, H rows of the map (ranks), W columns of the map (layers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from sglang_moelb.live.heat import Heat, blockwise_max, level_of, levels_of
from sglang_moelb.live.lines import LABEL, fitted, line
from sglang_moelb.live.wire import Pass

# Character and style of a level, see `heat.EDGES`.
CELLS = (
    (" ", ""),
    *[("·", "blue")] * 2,  # below 0.5 of the mean
    *[("░", "cyan")] * 3,  # below 0.9
    *[("▒", "green")] * 2,  # below 1.1
    *[("▓", "yellow")] * 2,  # below 1.35
    *[("█", "red")] * 3,  # below 2
    ("2", "bold white on red"),
    ("3", "bold white on red"),
    ("4", "bold white on magenta"),
)
LEGEND = (
    ("load / mean of the layer:", LABEL),
    (" · ", "blue"), "<0.5",
    (" ░ ", "cyan"), "<0.9",
    (" ▒ ", "green"), "even",
    (" ▓ ", "yellow"), ">1.1",
    (" █ ", "red"), ">1.35",
    (" "), ("2", "bold white on red"), " 2x and more",
)  # fmt: skip
LABELS = 7
NUMBERS = 11  # 1.84→1.25 and a space on both sides
SIDE = 34  # beside the map: numbers and bars of ranks, or numbers of all layers
MIN_BAR, MAX_BAR = 8, 40
MAX_CELL = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What goes where: cells in the map, ranks and layers in a cell, and cells of the bars."""

    num_columns: int
    cell: int
    ranks_per_row: int
    layers_per_column: int
    bar: int


def chart(
    shown: Pass, heat: Heat | None, width: int, max_rows: int, *, after: bool = False
) -> list[Text]:
    """Heat map, bars and the strips of layers, in at most `max_rows` rows of ranks.

    The map is of the loads before the lever, or `after` it.
    """
    num_layers, num_ranks = len(shown.balance_before_L), len(shown.rows_before_R)
    if not num_layers or not num_ranks:
        return [line(("the pass had no MoE layers", LABEL))]
    grid = _grid(num_layers, num_ranks, heat, width, max_rows)
    levels_HW = None
    if heat:
        levels_HW = blockwise_max(
            levels_of(heat, heat.after if after and heat.after else heat.before),
            grid.ranks_per_row // heat.ranks_per_row,
            grid.layers_per_column // heat.layers_per_column,
        )
    lines = [_axis(grid, num_layers, _which_map(heat, after=after), width)]
    lines += _rank_rows(shown, levels_HW, grid)
    lines += _layer_rows(shown, grid)
    return lines


def legend(width: int) -> Text:
    """What the characters mean."""
    text = line(*LEGEND)
    return fitted(text, width) if text.cell_len > width else text


def _grid(num_layers: int, num_ranks: int, heat: Heat | None, width: int, max_rows: int) -> Grid:
    """The finest grid that fits: blocks are multiples of what the server has aggregated."""
    ranks_step = heat.ranks_per_row if heat else 1
    layers_step = heat.layers_per_column if heat else 1
    room = max(width - LABELS - min(SIDE, (width - LABELS) // 2), 1)
    layers_per_column = _block(num_layers, layers_step, room)
    num_columns = -(-num_layers // layers_per_column)
    cell = max(1, min(MAX_CELL, room // num_columns))
    left = width - LABELS - num_columns * cell - NUMBERS
    return Grid(
        num_columns=num_columns,
        cell=cell,
        ranks_per_row=_block(num_ranks, ranks_step, max(max_rows, 1)),
        layers_per_column=layers_per_column,
        bar=max(min(left, MAX_BAR), 0),
    )


def _block(count: int, step: int, room: int) -> int:
    """The smallest multiple of `step` of which `room` blocks hold `count`."""
    return step * -(-count // (step * room))


def _which_map(heat: Heat | None, *, after: bool) -> str:
    if not heat or not heat.after:
        return ""
    return "after (b: before)" if after else "before (a: after)"


def _axis(grid: Grid, num_layers: int, which: str, width: int) -> Text:
    """Layer numbers above the map, and what a cell stands for."""
    text = "layer".ljust(LABELS)
    room = grid.num_columns * grid.cell
    marks = [" "] * room
    next_free = 0
    for column in range(grid.num_columns):
        name = str(column * grid.layers_per_column)
        at = column * grid.cell
        is_last = column == grid.num_columns - 1
        if at >= next_free and (at + len(name) <= room or is_last):
            for offset, char in enumerate(name[: room - at]):
                marks[at + offset] = char
            next_free = at + max(len(name) + 2, 8 if grid.cell == 1 else 0)
    text += "".join(marks)
    if grid.ranks_per_row * grid.layers_per_column > 1:
        block = f"max of {grid.ranks_per_row}x{grid.layers_per_column}"
        which = f"{block}, {which}" if which else block
    which = f" {which}"
    return line((text, LABEL), (which[: max(width - len(text), 0)], LABEL))


def _rank_rows(shown: Pass, levels_HW: NDArray[np.int64] | None, grid: Grid) -> list[Text]:
    before_R, after_R = _shares(shown.rows_before_R), _shares(shown.rows_after_R)
    scale = max([*before_R, *after_R, 1.25])
    rows = []
    for row, first in enumerate(range(0, len(before_R), grid.ranks_per_row)):
        last = min(first + grid.ranks_per_row, len(before_R))
        text = line((_rank_label(first, last - 1), LABEL))
        if levels_HW is not None:
            text.append_text(cells(levels_HW[row].tolist(), grid.cell))
        else:
            text.append(" " * grid.num_columns * grid.cell)
        before, after = max(before_R[first:last]), max(after_R[first:last])
        text.append(f" {numbers(before, after)} ")
        if grid.bar >= MIN_BAR:
            idle = sum(num == 0 for num in shown.num_tokens_R[first:last])
            note = _idle_note(idle, last - first)
            text.append_text(_load_bar(before / scale, after / scale, grid.bar, note))
        rows.append(text)
    return rows


def _rank_label(first: int, last: int) -> str:
    name = str(first) if first == last else f"{first}-{last}"
    return f"{'r' + name:<{LABELS}}"


def _idle_note(num_idle: int, num_ranks: int) -> str:
    if not num_idle:
        return ""
    return " no tokens" if num_ranks == 1 else f" {num_idle} without tokens"


def _load_bar(before: float, after: float, width: int, note: str) -> Text:
    """What stays as a full bar; dim after it what a lever took off, or green what it added."""
    room = width - len(note) if width - len(note) >= MIN_BAR else width
    stays = round(min(before, after) * room)
    moved = round(max(before, after) * room) - stays
    text = line(("█" * stays, "blue"))
    text.append(*(("░" * moved, "dim") if after < before else ("▒" * moved, "green")))
    return text.append(note if room < width else "", "yellow")


def numbers(before: float, after: float) -> str:
    """A load before and after a lever, in nine cells; once where they are equal."""
    first, second = _short(before), _short(after)
    return f"{first:>9}" if first == second else f"{first}→{second}".rjust(9)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _layer_rows(shown: Pass, grid: Grid) -> list[Text]:
    """max/mean of each layer, before the lever and after it."""
    rows = [("before", shown.balance_before_L)]
    if shown.balance_after_L != shown.balance_before_L:
        rows.append(("after", shown.balance_after_L))
    return [_layer_row(name, balance_L, grid) for name, balance_L in rows]


def _layer_row(name: str, balance_L: Sequence[float], grid: Grid) -> Text:
    size = grid.layers_per_column
    worst = [max(balance_L[at : at + size]) for at in range(0, len(balance_L), size)]
    text = line((f"{name:<{LABELS}}", LABEL))
    text.append_text(cells([level_of(value) for value in worst], grid.cell))
    mean = sum(balance_L) / len(balance_L)
    top = max(balance_L)
    text.append(f" mean {mean:.2f}, worst {top:.2f} (layer {list(balance_L).index(top)})")
    return text


def cells(levels: Sequence[int], cell: int) -> Text:
    """A row of the map, each level `cell` cells wide, with a gap where there is room."""
    text = line()
    gap = 1 if cell >= 3 else 0
    for level, group in itertools.groupby(levels):
        char, style = CELLS[level]
        one = char * (cell - gap)
        for _ in group if gap else ():
            text.append(one, style).append(" " * gap)
        if not gap:
            text.append(one * sum(1 for _ in group), style)
    return text


def _shares(rows_R: Sequence[int]) -> list[float]:
    mean = sum(rows_R) / len(rows_R)
    return [rows / mean if mean else 0.0 for rows in rows_R]
