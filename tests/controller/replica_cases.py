"""Routings for the replica planner, its rule in plain loops, and the best plan by brute force.

Shape letters: E logical experts, R ranks.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from sglang_moelb.controller.place_replicas import CopyCosts, ReplicaPlan, limits
from sglang_moelb.types import IntArray

NUM_TOKENS, TOPK = 8192, 8


def routed(weights_E: np.ndarray, num_ranks: int, seed: int = 0) -> IntArray:
    """Rows [R, E] of `NUM_TOKENS` tokens a rank, drawn by the weights of the experts."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(NUM_TOKENS * TOPK, weights_E / weights_E.sum(), size=num_ranks)


def rank_skewed(num_ranks: int, num_experts: int, skew: float, seed: int = 0) -> IntArray:
    """One rank has `skew` times the mean; zipf-like inside every rank."""
    rng = np.random.default_rng(seed)
    inside_Re = rng.permutation(np.arange(1, num_experts + 1) ** -0.5).reshape(num_ranks, -1)
    inside_Re /= inside_Re.sum(axis=1, keepdims=True)
    share_R = np.full(num_ranks, (num_ranks - skew) / max(num_ranks - 1, 1))
    share_R[seed % num_ranks] = skew
    return routed((inside_Re * share_R[:, None]).ravel(), num_ranks, seed)


def one_hot(num_ranks: int, num_experts: int, share: float, seed: int = 0) -> IntArray:
    """One expert gets `share` of all rows, the others the rest evenly."""
    weights_E = np.full(num_experts, (1 - share) / (num_experts - 1))
    weights_E[seed % num_experts] = share
    return routed(weights_E, num_ranks, seed)


def zipf(num_ranks: int, num_experts: int, alpha: float, *, mixed: bool, seed: int = 0) -> IntArray:
    """Zipf over the experts, mixed over the ranks or the hottest all on rank 0."""
    weights_E = np.arange(1, num_experts + 1) ** -alpha
    if mixed:
        weights_E = np.random.default_rng(seed).permutation(weights_E)
    return routed(weights_E, num_ranks, seed)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[IntArray, int, CopyCosts]:
    """Rows [R, E], slots and costs; idle ranks and idle experts are common."""
    num_ranks, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    entry = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 200))
    shape = (num_ranks, num_ranks * size)
    flat = draw(st.lists(entry, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    rows_RE = np.array(flat, dtype=np.int64).reshape(shape)
    rows_RE[:, draw(st.integers(0, shape[1] - 1))] *= draw(st.sampled_from((0, 1, 1, 30)))
    costs = CopyCosts(
        send_rows=draw(st.sampled_from((0, 0, 1, 7, 60))),
        receive_rows=draw(st.sampled_from((0, 0, 1, 5, 40))),
        min_rows=draw(st.sampled_from((1, 1, 2, 10, 100))),
    )
    return rows_RE, draw(st.integers(0, 4)), costs


def rank_times(plan: ReplicaPlan, costs: CopyCosts) -> list[int]:
    """Time of each rank in rows: what it computes, and what copies cost it."""
    size = len(plan.quota_ER) // len(plan.slots_RS)
    times = plan.quota_ER.sum(axis=0).tolist()
    for rank, slots in enumerate(plan.slots_RS.tolist()):
        for expert in slots:
            if expert >= 0:
                times[rank] += costs.receive_rows
                times[expert // size] += costs.send_rows
    return times


def loop_plan(rows_RE: IntArray, num_slots: int, costs: CopyCosts) -> tuple[list, list]:
    """What `place_replicas` promises, one limit after another: slots and quotas."""
    num_ranks, num_experts = rows_RE.shape
    size = num_experts // num_ranks
    load = rows_RE.sum(axis=0).tolist()
    rank_load = [sum(load[r * size : (r + 1) * size]) for r in range(num_ranks)]
    least = max(costs.min_rows, costs.send_rows + 1)
    best_score, best_copies = None, []
    for limit in limits(max(rank_load), -(-sum(rank_load) // num_ranks)).tolist():
        room = [max(limit - rows, 0) for rows in rank_load]
        free = [num_slots] * num_ranks
        copies, missed, is_full = [], 0, False
        for home in sorted(range(num_ranks), key=lambda r: (-rank_load[r], r)):
            need = rank_load[home] - limit
            left = {e: load[e] for e in range(home * size, (home + 1) * size)}
            while need > 0 and not is_full:
                expert = min(left, key=lambda e: (-left[e], e))
                usable = [r for r in range(num_ranks) if free[r]]
                usable.sort(key=lambda r: (-room[r], -free[r], r))
                is_full = not usable or room[usable[0]] - costs.receive_rows < least
                if is_full or left[expert] < least:
                    break
                to = usable[0]
                rows = min(need + costs.send_rows, left[expert], room[to] - costs.receive_rows)
                rows = max(rows, least)
                copies.append((expert, to, num_slots - free[to], rows))
                room[to] -= rows + costs.receive_rows
                free[to] -= 1
                left[expert] -= rows
                need -= rows - costs.send_rows
            missed = max(missed, need)
        if best_score is None or limit + missed <= best_score:
            best_score, best_copies = limit + missed, copies
    slots = [[-1] * num_slots for _ in range(num_ranks)]
    quotas = [[load[e] * (e // size == r) for r in range(num_ranks)] for e in range(num_experts)]
    for expert, rank, slot, rows in best_copies:
        slots[rank][slot] = expert
        quotas[expert][rank] += rows
        quotas[expert][expert // size] -= rows
    return slots, quotas


def best_time(rows_RE: IntArray, num_slots: int, costs: CopyCosts) -> int:
    """Time of the slowest rank of the best plan there is, over every choice of copies.

    For one choice the best split of the rows follows from Hall's theorem: for each set of experts,
    the ranks that hold one of them must have room for all its rows. A copy's minimum is set aside.
    """
    num_ranks, num_experts = rows_RE.shape
    size = num_experts // num_ranks
    load = rows_RE.sum(axis=0).tolist()
    foreign = [[e for e in range(num_experts) if e // size != r] for r in range(num_ranks)]
    choices = [
        [c for n in range(num_slots + 1) for c in itertools.combinations(foreign[r], n)]
        for r in range(num_ranks)
    ]
    subsets = [
        [e for e in range(num_experts) if mask >> e & 1] for mask in range(1, 1 << num_experts)
    ]
    best = max(sum(load[r * size : (r + 1) * size]) for r in range(num_ranks))
    for chosen in itertools.product(*choices):
        fixed, left = [0] * num_ranks, list(load)
        holders = [{e // size} for e in range(num_experts)]
        for rank, copied in enumerate(chosen):
            for expert in copied:
                fixed[rank] += costs.receive_rows + costs.min_rows
                fixed[expert // size] += costs.send_rows
                left[expert] -= costs.min_rows
                holders[expert].add(rank)
        if min(left) < 0:
            continue
        time = max(fixed)
        for subset in subsets:
            ranks = set().union(*(holders[e] for e in subset))
            rows = sum(left[e] for e in subset) + sum(fixed[r] for r in ranks)
            time = max(time, -(-rows // len(ranks)))
        best = min(best, time)
    return best
