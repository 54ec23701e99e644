"""Rules that keep every row: no balancing, the perfect balance, LLEP and UltraEP's quota planner.

All are vectorised over N samples, a pass and layer each, because a replay has ten thousands.

Shape letters: P passes, L MoE layers, R EP ranks, E logical experts, e experts of a rank,
N samples, A samples still being worked on.
"""

from __future__ import annotations

import numpy as np

from sglang_moelb.replay.types import Counts, Outcome, by_rank
from sglang_moelb.types import IntArray


def none(counts: Counts) -> Outcome:
    """Every expert on its own rank: stock expert parallelism."""
    return Outcome(rows_PLR=counts.rows_PLR)


def ideal(counts: Counts) -> Outcome:
    """Rows dealt evenly to all ranks: the bound of every exact rule."""
    total_PL1 = counts.rows_PLR.sum(axis=2, keepdims=True)
    first_R = np.arange(counts.num_ranks)
    return Outcome(
        rows_PLR=total_PL1 // counts.num_ranks + (first_R < total_PL1 % counts.num_ranks)
    )


def llep(
    counts: Counts, *, trigger: float = 1.3, slack: float = 1.0, min_rows: int = 1024
) -> Outcome:
    """LLEP: spill the rows of full ranks, hottest expert first, to the least loaded ones.

    Args:
        counts: the passes.
        trigger: max/mean of rank rows below which nothing is done (lambda).
        slack: capacity of a rank in mean rows (alpha).
        min_rows: fewest rows worth a GEMM on a foreign rank (m).

    Source: LLEP (arXiv 2601.17111); rank loads trigger it as in its code; a spill that does not
    fit, room below 0 included, is skipped, and ties go to the lower rank (ours).
    """
    rows_PLE = counts.rows_PLE
    rows_NE = rows_PLE.reshape(-1, rows_PLE.shape[2])
    native_NR = by_rank(rows_NE, counts.num_ranks)
    total_N = native_NR.sum(axis=1)
    acts_N = native_NR.max(axis=1) * counts.num_ranks >= trigger * np.maximum(total_N, 1)
    after_NR = native_NR.copy()
    if acts_N.any():
        capacity_A = (slack * total_N[acts_N] / counts.num_ranks).astype(np.int64)
        after_NR[acts_N] = _llep(rows_NE[acts_N], native_NR[acts_N], capacity_A, min_rows)
    return Outcome(rows_PLR=after_NR.reshape(*rows_PLE.shape[:2], counts.num_ranks))


def _llep(
    rows_NE: IntArray, native_NR: IntArray, capacity_N: IntArray, min_rows: int
) -> IntArray:
    """Assigned plus pending rows of each rank once every expert has been placed."""
    num_experts, num_ranks = rows_NE.shape[1], native_NR.shape[1]
    load_NR = native_NR.copy()
    at_N = np.arange(len(rows_NE))
    for expert_N in np.argsort(-rows_NE, axis=1, kind="stable").T:
        native_N = expert_N // (num_experts // num_ranks)
        rows_N = rows_NE[at_N, expert_N]
        over_N = load_NR[at_N, native_N] - capacity_N
        spill_N = np.clip(over_N, 0, rows_N)
        load_NR[at_N, native_N] -= spill_N
        left = np.flatnonzero(spill_N)
        while left.size:
            taken = _spill(load_NR, left, native_N, spill_N, capacity_N, min_rows)
            spill_N[left] -= taken
            left = left[spill_N[left] > 0]
    return load_NR


def _spill(
    load_NR: IntArray,
    left: IntArray,
    native_N: IntArray,
    spill_N: IntArray,
    capacity_N: IntArray,
    min_rows: int,
) -> IntArray:
    """One spill of the samples `left`; returns how many rows each has placed."""
    load_AR = load_NR[left]
    at_A = np.arange(len(left))
    spill_A1 = spill_N[left][:, None]
    sort_AR = load_AR.copy()
    sort_AR[at_A, native_N[left]] = np.iinfo(np.int64).max
    order_AR = np.argsort(sort_AR, axis=1, kind="stable")[:, :-1]
    room_AR = capacity_N[left][:, None] - np.take_along_axis(load_AR, order_AR, axis=1)
    take_AR = np.minimum(spill_A1, room_AR)
    fits_AR = (take_AR > 0) & ((take_AR >= min_rows) | (spill_A1 <= take_AR))
    first_A = fits_AR.argmax(axis=1)
    fits_A = fits_AR[at_A, first_A]
    taken_A = np.where(fits_A, take_AR[at_A, first_A], spill_A1[:, 0])
    load_NR[left, order_AR[at_A, first_A]] += taken_A
    return taken_A


def ultraep(
    counts: Counts, *, min_rows: int = 1024, num_slots: int = 2, tolerance: float = 0.01
) -> Outcome:
    """UltraEP's quota planner: the smallest threshold at which all excess finds a replica.

    Args:
        counts: the passes.
        min_rows: fewest rows worth a replica.
        num_slots: replica slots of a rank.
        tolerance: of the threshold, relative.

    Source: UltraEP v1.0.0 (arXiv 2606.04101); an expert may feed several replicas in turn.
    """
    rows_PLE = counts.rows_PLE
    rows_NE = rows_PLE.reshape(-1, rows_PLE.shape[2])
    load_NR = by_rank(rows_NE, counts.num_ranks)
    after_NR = load_NR.copy()
    high_N = load_NR.max(axis=1)
    low_N = -(-load_NR.sum(axis=1) // counts.num_ranks)
    mid_N = low_N.copy()  # perfect balance first, then bisection
    open_N = high_N > low_N
    while open_N.any():
        at = np.flatnonzero(open_N)
        moved_AR, ok_A = _oracle(rows_NE[at], load_NR[at], mid_N[at], min_rows, num_slots)
        good, bad = at[ok_A], at[~ok_A]
        after_NR[good] = moved_AR[ok_A]
        high_N[good] = mid_N[good]
        low_N[bad] = mid_N[bad]
        open_N = (high_N - low_N > 1) & (high_N - low_N > tolerance * low_N)
        mid_N = (low_N + high_N) // 2
    return Outcome(rows_PLR=after_NR.reshape(*rows_PLE.shape[:2], counts.num_ranks))


def _oracle(
    rows_NE: IntArray, load_NR: IntArray, limit_N: IntArray, min_rows: int, num_slots: int
) -> tuple[IntArray, np.ndarray]:
    """Rank rows after the exports that a threshold asks for, and whether it can be met."""
    num_ranks = load_NR.shape[1]
    rows_NRe = rows_NE.reshape(len(rows_NE), num_ranks, -1)
    after_NR, slots_NR = load_NR.copy(), np.full_like(load_NR, num_slots)
    slack_NR = np.maximum(limit_N[:, None] - load_NR, 0)
    ok_N = np.maximum(load_NR - limit_N[:, None], 0).sum(axis=1) <= slack_NR.sum(axis=1)
    for rank_N in np.argsort(-load_NR, axis=1, kind="stable").T:
        over_N = np.take_along_axis(after_NR, rank_N[:, None], axis=1)[:, 0] > limit_N
        at = np.flatnonzero(ok_N & over_N)
        if not at.size:
            break
        need_A = after_NR[at, rank_N[at]] - limit_N[at]
        own_Ae = rows_NRe[at, rank_N[at]]
        for own_A in np.argsort(-own_Ae, axis=1, kind="stable").T:
            available_A = np.take_along_axis(own_Ae, own_A[:, None], 1)[:, 0] - 1
            _export(after_NR, slack_NR, slots_NR, at, rank_N[at], need_A, available_A, min_rows)
            if not need_A.any():
                break
        ok_N[at[need_A > 0]] = False
    return after_NR, ok_N


def _export(
    after_NR: IntArray,
    slack_NR: IntArray,
    slots_NR: IntArray,
    at: IntArray,
    rank_A: IntArray,
    need_A: IntArray,
    available_A: IntArray,
    min_rows: int,
) -> None:
    """Export one expert of each sample `at` to replicas; all but `rank_A` is changed in place."""
    live = np.arange(len(at))
    while live.size:
        rows = at[live]
        # A rank that holds the expert already has no slack left, so it need not be excluded.
        free_AR = np.where(slots_NR[rows] == 0, 0, slack_NR[rows])
        target_A = free_AR.argmax(axis=1)
        slack_A = free_AR[np.arange(len(live)), target_A]
        quota_A = np.minimum(np.minimum(need_A[live], available_A[live]), slack_A)
        done = quota_A < max(min_rows, 1)
        live, rows, target_A, quota_A = (x[~done] for x in (live, rows, target_A, quota_A))
        after_NR[rows, target_A] += quota_A
        after_NR[rows, rank_A[live]] -= quota_A
        slack_NR[rows, target_A] -= quota_A
        slots_NR[rows, target_A] -= 1
        need_A[live] -= quota_A
        available_A[live] -= quota_A
