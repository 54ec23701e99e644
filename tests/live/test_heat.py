"""Laws of the map: a cell is a level of load over mean, and a block shows its highest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.live.heat import (
    EDGES,
    MAX_COLUMNS,
    MAX_ROWS,
    blockwise_max,
    heat_of,
    level_of,
    levels_of,
)


def test_the_example_of_the_docstring() -> None:
    rows_LR = np.array([[3, 1], [2, 2]])
    heat = heat_of(7, rows_LR, rows_LR)
    assert (heat.step, heat.num_rows, heat.num_columns) == (7, 2, 2)
    assert (heat.before, heat.after) == ("b737", "")


@pytest.mark.parametrize("level", range(1, len(EDGES) + 1))
def test_a_level_begins_at_its_edge(level: int) -> None:
    edge = EDGES[level - 1]
    assert level_of(edge) == (level if edge else 0)
    assert level_of(edge + 0.01) == level


def test_only_no_rows_at_all_are_level_none() -> None:
    assert level_of(0.0) == 0
    assert level_of(1e-9) == 1
    heat = heat_of(0, np.array([[0, 1, 10_000]]), np.array([[0, 1, 10_000]]))
    assert heat.before == "01d"
    assert heat_of(
        0, np.zeros((2, 2), dtype=np.int64), np.zeros((2, 2), dtype=np.int64)
    ).before == ("0000")


@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 9))
def test_every_cell_is_the_highest_level_of_its_block(
    num_layers: int, num_ranks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before_LR = rng.integers(0, 50, (num_layers, num_ranks))
    after_LR = before_LR // 2
    heat = heat_of(0, before_LR, after_LR)
    assert heat.num_rows <= MAX_ROWS
    assert heat.num_columns <= MAX_COLUMNS
    for digits, rows_LR in ((heat.before, before_LR), (heat.after, after_LR)):
        if not digits:
            assert np.array_equal(before_LR, after_LR)
            continue
        levels_HW = levels_of(heat, digits)
        layer, rank = int(rng.integers(num_layers)), int(rng.integers(num_ranks))
        mean = rows_LR[layer].mean() or 1.0
        row, column = rank // heat.ranks_per_row, layer // heat.layers_per_column
        assert levels_HW[row, column] >= level_of(rows_LR[layer, rank] / mean)
        block = rows_LR[
            column * heat.layers_per_column : (column + 1) * heat.layers_per_column,
            row * heat.ranks_per_row : (row + 1) * heat.ranks_per_row,
        ]
        means = rows_LR[column * heat.layers_per_column :][: len(block)].mean(axis=1)
        shares = block / np.maximum(means, 1e-9)[:, None]
        assert levels_HW[row, column] == max(level_of(x) for x in shares.ravel().tolist())


def test_blocks_at_the_ends_may_be_smaller() -> None:
    values = np.arange(15).reshape(3, 5)
    assert blockwise_max(values, 2, 3).tolist() == [[7, 9], [12, 14]]


def test_a_map_that_was_cut_off_is_not_drawn() -> None:
    heat = heat_of(0, np.array([[3, 1]]), np.array([[3, 1]]))
    with pytest.raises(ValueError, match="reshape"):
        levels_of(heat, "b")
