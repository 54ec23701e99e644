"""A pass as the controller sees it, and how far its window of passes can be trusted.

Only prefill passes with at least `min_batch_tokens` tokens enter the window: no lever acts in
others, and decode is bound by memory, not by the busiest rank.

Shape letters: L MoE layers, E logical experts, R ranks, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_moelb.types import FloatArray, IntArray, StepRecord, Topology

BoolArray = NDArray[np.bool_]

HALF_TRUSTED_PASSES = 2  # so many passes without any spread give a confidence of one half
OUTLIER = 5.0  # times the median; a compile in the first passes is far above


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLoad:
    """One pass of the window: rows per rank before any lever, and max/mean of them.

    `num_tokens` is over all ranks; `slowest_rows` the rows of the fullest rank, added up over
    layers, before any lever, and `slowest_rows_run` after the one that acted.
    """

    record: StepRecord
    rows_LR: IntArray
    balance_L: FloatArray
    num_tokens: int
    slowest_rows: int
    slowest_rows_run: int


def enters(record: StepRecord, *, min_batch_tokens: int) -> bool:
    """Whether the pass says anything about what a lever would do. Runs on the host. Ours."""
    num_tokens = int(record.num_tokens_R.sum())
    return record.phase == "prefill" and num_tokens >= max(min_batch_tokens, 1)


def load_of(record: StepRecord, topology: Topology) -> PassLoad:
    """The load of one pass. Runs on the host. Ours.

    Asserts that the record's shapes are the topology's: a record of another model would move the
    estimates without a trace.
    """
    shape = (topology.num_layers, topology.num_experts)
    assert record.rows_LEM.shape[:2] == shape, (record.rows_LEM.shape, shape)
    assert record.rows_after_LR.shape == (topology.num_layers, topology.num_ranks)
    rows_LE = record.rows_LEM.sum(axis=2)
    rows_LR = rows_LE.reshape(topology.num_layers, topology.num_ranks, -1).sum(axis=2)
    return PassLoad(
        record=record,
        rows_LR=rows_LR,
        balance_L=balance(rows_LR),
        num_tokens=int(record.num_tokens_R.sum()),
        slowest_rows=int(rows_LR.max(axis=1).sum()),
        slowest_rows_run=int(record.rows_after_LR.max(axis=1).sum()),
    )


def balance(rows_LR: IntArray) -> FloatArray:
    """max/mean over ranks of each layer, float64 [L]; 1.0 is perfect, and a layer without rows.

    Runs on the host. The project's definition of balance.
    """
    total_L = rows_LR.sum(axis=1)
    scaled_L = rows_LR.max(axis=1) * float(rows_LR.shape[1])
    balance_L: FloatArray = np.where(total_L > 0, scaled_L / np.maximum(total_L, 1), 1.0)
    return balance_L


def mean_balance(loads: Sequence[PassLoad], num_layers: int) -> FloatArray:
    """Mean over passes of each layer's balance, float64 [L]; 1.0 where there is no pass.

    The mean of the passes' balances, not the balance of their mean rows: which rank is the busiest
    changes from pass to pass, and rows added up would hide it. Runs on the host. Ours.
    """
    if not loads:
        return np.ones(num_layers)
    balance_L: FloatArray = np.stack([load.balance_L for load in loads]).mean(axis=0)
    return balance_L


def confidence(loads: Sequence[PassLoad]) -> float:
    """How far the mean of the window can be trusted, in [0, 1).

    n / (n + 2) for n passes, divided by 1 + standard deviation / mean over the passes of the
    balance (mean over layers). Runs on the host. Ours.
    """
    if not loads:
        return 0.0
    balances = np.stack([load.balance_L for load in loads]).mean(axis=1)
    spread = float(balances.std() / balances.mean())
    return full_confidence(len(loads)) / (1.0 + spread)


def full_confidence(num_passes: int) -> float:
    """The confidence that `num_passes` passes without any spread give. Runs on the host. Ours."""
    return num_passes / (num_passes + HALF_TRUSTED_PASSES)


def usable_times(ms: FloatArray, size: IntArray | FloatArray) -> BoolArray:
    """Which measured times to learn from; `ms` and the `size` of the work have one shape.

    A time counts if it is finite and above 0, its size is above 0, and it is not more than OUTLIER
    times the median both in itself and per unit of size: a large batch is slow but not per row,
    a small one is slow per row but not in itself, a compile is both. Runs on the host. Ours.
    """
    known = np.isfinite(ms) & (size > 0)
    known[known] = ms[known] > 0
    if known.any():
        per_unit = ms[known] / size[known]
        slow = ms[known] > OUTLIER * np.median(ms[known])
        known[known] = ~(slow & (per_unit > OUTLIER * np.median(per_unit)))
    return known
