"""A pass as the controller sees it, and how far its window of passes can be trusted.

Only prefill passes with at least `min_batch_tokens` tokens enter the window: no lever acts in
others, and decode is bound by memory, not by the busiest rank.

What depends on one pass alone is worked out once, when it comes in: this runs in a thread of the
serving process, and whatever it takes is taken from the scheduler.

Shape letters: L MoE layers, E logical experts, R ranks, M modalities, V variants of a pass,
N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.types import FloatArray, IntArray, StepRecord, Topology

BoolArray = NDArray[np.bool_]

UNLEARNT = LowCost()
HALF_TRUSTED_PASSES = 2  # so many passes without any spread give a confidence of one half
OUTLIER = 5.0  # times the median; a compile in the first passes is far above
NUM_NEW = 3  # passes in a row that must be unlike all before, for a load to be a new one
MORE_SKEWED, LARGER = 1.1, 2.0  # times the balance, and the tokens, of a pass


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLoad:
    """One pass of the window: rows per rank before any lever, and max/mean of them.

    Numbers of tokens and `rows_L` are over all ranks; `slowest_rows` the rows of the fullest rank,
    added up over layers, before any lever, and `slowest_rows_run` after the one that acted, where
    rows at low precision count for what they cost; `my_rows_L` what this rank's experts received,
    `low_L` where any row of any rank ran at low precision, `copied_L` where experts were copied;
    `num_copies` are those to the rank that received most in a layer, added up over layers.
    `mean_balance` is over layers.
    """

    record: StepRecord
    rows_LR: IntArray
    rows_L: IntArray
    my_rows_L: FloatArray
    low_L: BoolArray
    copied_L: BoolArray
    balance_L: FloatArray
    mean_balance: float
    num_tokens: int
    num_protected_tokens: int
    num_refused_tokens: int
    slowest_rows: int
    slowest_rows_run: int
    num_copies: int


def enters(record: StepRecord, *, min_batch_tokens: int) -> bool:
    """Whether the pass says anything about what a lever would do. Runs on the host. Ours."""
    return record.phase == "prefill" and _total(record.num_tokens_R) >= max(min_batch_tokens, 1)


def load_of(
    record: StepRecord, topology: Topology, low_cost: LowCost = UNLEARNT
) -> PassLoad:
    """The load of one pass. Runs on the host. Ours.

    Asserts that the record's shapes are the topology's: a record of another model would move the
    estimates without a trace.
    """
    shape = (topology.num_layers, topology.num_experts)
    assert record.rows_LEM.shape[:2] == shape, (record.rows_LEM.shape, shape)
    assert record.rows_after_LR.shape == (topology.num_layers, topology.num_ranks)
    rows_LR = record.rows_LEM.reshape(topology.num_layers, topology.num_ranks, -1).sum(axis=2)
    rows_L, max_L = rows_LR.sum(axis=1), rows_LR.max(axis=1)
    balance_L = balance_of(max_L, rows_L, topology.num_ranks)
    run_LR = record.rows_after_LR.astype(np.float64)
    low_LR = np.zeros_like(rows_LR) if record.low_rows_LR is None else record.low_rows_LR
    copies_LR = np.zeros_like(rows_LR) if record.num_copies_LR is None else record.num_copies_LR
    if low_LR.any():
        run_LR = low_cost.effective(record.rows_after_LR, low_LR, topology)
    return PassLoad(
        record=record,
        rows_LR=rows_LR,
        rows_L=rows_L,
        my_rows_L=record.rows_after_LR[:, record.rank].astype(np.float64),
        low_L=low_LR.max(axis=1) > 0,
        copied_L=copies_LR.max(axis=1) > 0,
        balance_L=balance_L,
        mean_balance=float(balance_L.sum()) / topology.num_layers,
        num_tokens=_total(record.num_tokens_R),
        num_protected_tokens=_total(record.num_protected_tokens_R),
        num_refused_tokens=_total(record.num_refused_tokens_R),
        slowest_rows=int(max_L.sum()),
        slowest_rows_run=int(run_LR.max(axis=1).sum()),
        num_copies=int(copies_LR.max(axis=1).sum()),
    )


def balance(rows_LR: IntArray) -> FloatArray:
    """max/mean over ranks of each layer, float64 [L]; 1.0 is perfect, and a layer without rows.

    Runs on the host. The project's definition of balance.
    """
    return balance_of(rows_LR.max(axis=1), rows_LR.sum(axis=1), rows_LR.shape[1])


def balance_of(max_VL: IntArray, total_VL: IntArray, num_ranks: int) -> FloatArray:
    """`balance` from the fullest rank's rows and those of all ranks, any shape; float64.

    Runs on the host.
    """
    balance_VL: FloatArray = np.where(
        total_VL > 0, max_VL * float(num_ranks) / np.maximum(total_VL, 1), 1.0
    )
    return balance_VL


def mean_balance(loads: Sequence[PassLoad], num_layers: int) -> FloatArray:
    """Mean over passes of each layer's balance, float64 [L]; 1.0 where there is no pass.

    The mean of the passes' balances, not the balance of their mean rows: which rank is the busiest
    changes from pass to pass, and rows added up would hide it. Runs on the host. Ours.
    """
    if not loads:
        return np.ones(num_layers)
    balance_N = np.concatenate([load.balance_L for load in loads])
    balance_L: FloatArray = balance_N.reshape(len(loads), num_layers).sum(axis=0) / len(loads)
    return balance_L


def confidence(loads: Sequence[PassLoad]) -> float:
    """How far the mean of the window can be trusted, in [0, 1).

    n / (n + 2) for n passes, divided by 1 + standard deviation / mean over the passes of the
    balance (mean over layers). Runs on the host. Ours.
    """
    if not loads:
        return 0.0
    balances = [load.mean_balance for load in loads]
    mean = math.fsum(balances) / len(loads)
    variance = math.fsum([(one - mean) ** 2 for one in balances]) / len(loads)
    return full_confidence(len(loads)) / (1.0 + math.sqrt(variance) / mean)


def full_confidence(num_passes: int) -> float:
    """The confidence that `num_passes` passes without any spread give. Runs on the host. Ours."""
    return num_passes / (num_passes + HALF_TRUSTED_PASSES)


def first_of_new(loads: Sequence[PassLoad]) -> int:
    """Where in the window the newest load begins, if a heavier one has come; else 0.

    That is the fewest newest passes, at least NUM_NEW, which are all MORE_SKEWED, or all LARGER,
    than every one before. A load that comes and goes is in the window already and begins nothing,
    and one that has become lighter does not: a lever that stays on through it costs little, and
    one that flaps, more. Runs on the host. Ours.
    """
    if len(loads) <= NUM_NEW:
        return 0
    skews, sizes = [one.mean_balance for one in loads], [one.num_tokens for one in loads]
    skew_before, size_before = list(accumulate(skews, max)), list(accumulate(sizes, max))
    first = len(loads) - NUM_NEW
    least_skew, least_size = min(skews[first:]), min(sizes[first:])
    while first > 0:
        is_skewed = least_skew >= MORE_SKEWED * skew_before[first - 1]
        if is_skewed or least_size >= LARGER * size_before[first - 1]:
            return first
        first -= 1
        least_skew, least_size = min(least_skew, skews[first]), min(least_size, sizes[first])
    return 0


def usable_times(ms: FloatArray, size: IntArray | FloatArray) -> BoolArray:
    """Which measured times to learn from; `ms` and the `size` of the work have one shape.

    A time counts if it is finite and above 0, its size is above 0, and it is not more than OUTLIER
    times the median both in itself and per unit of size: a large batch is slow but not per row,
    a small one is slow per row but not in itself, a compile is both. Runs on the host. Ours.
    """
    known: BoolArray = (ms > 0) & (ms < np.inf) & (size > 0)
    if not known.any():
        return known
    slow = known & (ms > OUTLIER * _median(ms[known]))
    if slow.any():
        per_unit = ms[known] / size[known]
        known[slow] = ms[slow] / size[slow] <= OUTLIER * _median(per_unit)
    return known


def _median(values: FloatArray) -> float:
    # np.median spends most of its time on axes and NaN, of which there are none here
    ordered = np.sort(values)
    middle = len(ordered) // 2
    return float(ordered[middle] + ordered[-1 - middle]) / 2.0


def _total(counts_R: IntArray) -> int:
    # at so few ranks a list is added up sooner than an array
    return sum(counts_R.tolist())
