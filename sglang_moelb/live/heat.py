"""The load of every rank in every layer as one character a cell, small enough to poll.

A cell is the rows of a rank in a layer over the mean of that layer's ranks, as one of 16 levels.
Larger models and clusters are aggregated by their maximum: what slows a layer is its busiest rank.

Shape letters: L MoE layers, R ranks, H rows of the map (ranks), W columns of the map (layers).
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 64
MAX_COLUMNS = 96
# Level 0 is no rows at all; level i > 0 is a share of at least EDGES[i - 1] and below EDGES[i].
EDGES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 3.0, 4.0)
DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


class Heat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Loads of one pass: `num_rows` x `num_columns` hexadecimal digits, rank after rank.

    A digit is a level, see `edges`. Each cell is the highest of `ranks_per_row` x
    `layers_per_column` loads. `after` is "" where no lever acted.
    """

    step: int
    num_rows: int
    num_columns: int
    ranks_per_row: int
    layers_per_column: int
    before: str
    after: str = ""
    edges: tuple[float, ...] = EDGES


def heat_of(step: int, before_LR: NDArray[np.int64], after_LR: NDArray[np.int64]) -> Heat:
    """The map of a pass from rows on each rank, int64 [L, R]. On the host. Ours.

    Example: 2 layers and 2 ranks with rows [[3, 1], [2, 2]] give "b7" for rank 0 and "37" for
    rank 1: 1.5 and 0.5 of the mean in the first layer, 1.0 in the second.
    """
    num_layers, num_ranks = before_LR.shape
    ranks_per_row = -(-num_ranks // MAX_ROWS)
    layers_per_column = -(-num_layers // MAX_COLUMNS)
    sizes = (ranks_per_row, layers_per_column)
    same = np.array_equal(before_LR, after_LR)
    before_HW = _levels(before_LR, *sizes)
    return Heat(
        step=step,
        num_rows=before_HW.shape[0],
        num_columns=before_HW.shape[1],
        ranks_per_row=ranks_per_row,
        layers_per_column=layers_per_column,
        before=_digits(before_HW),
        after="" if same else _digits(_levels(after_LR, *sizes)),
    )


def level_of(share: float) -> int:
    """The level of a load given as a multiple of the mean; 0 only for 0."""
    return int(np.searchsorted(EDGES, share, side="right")) if share > 0.0 else 0


def levels_of(heat: Heat, digits: str) -> NDArray[np.int64]:
    """The levels of `heat.before` or `heat.after`, int64 [H, W]. Raises ValueError if cut off."""
    raw = np.array([int(digit, 16) for digit in digits], dtype=np.int64)
    return raw.reshape(heat.num_rows, heat.num_columns)


def blockwise_max(values_HW: NDArray[np.int64], high: int, wide: int) -> NDArray[np.int64]:
    """The maximum of each block of `high` x `wide` values; the last blocks may be smaller."""
    rows = np.arange(0, values_HW.shape[0], high)
    columns = np.arange(0, values_HW.shape[1], wide)
    blocks_HW: NDArray[np.int64] = np.maximum.reduceat(
        np.maximum.reduceat(values_HW, rows, axis=0), columns, axis=1
    )
    return blocks_HW


def _levels(rows_LR: NDArray[np.int64], ranks_per_row: int, per_column: int) -> NDArray[np.int64]:
    mean_L1 = np.maximum(rows_LR.mean(axis=1, keepdims=True), 1e-9)
    levels_LR = np.searchsorted(EDGES, rows_LR / mean_L1, side="right")
    levels_LR[rows_LR <= 0] = 0
    return blockwise_max(levels_LR.T.astype(np.int64), ranks_per_row, per_column)


def _digits(levels_HW: NDArray[np.int64]) -> str:
    return DIGITS[levels_HW].tobytes().decode("ascii")
