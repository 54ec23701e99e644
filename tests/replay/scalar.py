"""Peers' rules once more, one layer at a time in plain loops, to hold the vectorised ones to."""

from __future__ import annotations


def rank_loads(rows: list[int], num_ranks: int) -> list[int]:
    """Rows on each rank, experts in blocks."""
    size = len(rows) // num_ranks
    return [sum(rows[r * size : (r + 1) * size]) for r in range(num_ranks)]


def hottest_first(values: list[int]) -> list[int]:
    """Indices by value descending, ties by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def llep(
    rows: list[int], num_ranks: int, *, trigger: float = 1.3, slack: float = 1.0, min_rows: int
) -> list[int]:
    """LLEP of one layer, after its pseudo-code: pending and assigned rows apart."""
    native_loads = rank_loads(rows, num_ranks)
    total = sum(rows)
    if max(native_loads) * num_ranks < trigger * max(total, 1):
        return native_loads
    capacity = int(slack * total / num_ranks)
    pending, assigned = list(native_loads), [0] * num_ranks
    for expert in hottest_first(rows):
        native = expert * num_ranks // len(rows)
        load = rows[expert]
        pending[native] -= load
        room = capacity - assigned[native] - pending[native]
        kept = min(load, max(room, 0))
        assigned[native] += kept
        rest = load - kept
        while rest > 0:
            others = [r for r in range(num_ranks) if r != native]
            others.sort(key=lambda r: (assigned[r] + pending[r], r))
            for target in others:
                chunk = min(rest, capacity - assigned[target] - pending[target])
                if chunk <= 0 or (chunk < min_rows and rest > chunk):
                    continue
                break
            else:
                target, chunk = others[0], rest
            assigned[target] += chunk
            rest -= chunk
    return assigned


def ultraep(
    rows: list[int], num_ranks: int, *, min_rows: int, num_slots: int, tolerance: float = 0.01
) -> list[int]:
    """UltraEP's planner of one layer, after its pseudo-code."""
    loads = rank_loads(rows, num_ranks)
    low, high, best = -(-sum(rows) // num_ranks), max(loads), loads
    threshold = low
    while high > low:
        found = _oracle(rows, loads, threshold, min_rows, num_slots)
        if found is None:
            low = threshold
        else:
            best, high = found, threshold
        if high - low <= 1 or high - low <= tolerance * low:
            break
        threshold = (low + high) // 2
    return best


def _oracle(
    rows: list[int], loads: list[int], threshold: int, min_rows: int, num_slots: int
) -> list[int] | None:
    num_ranks, size = len(loads), len(rows) // len(loads)
    after, slots = list(loads), [num_slots] * num_ranks
    slack = [max(threshold - load, 0) for load in loads]
    if sum(max(load - threshold, 0) for load in loads) > sum(slack):
        return None
    for source in hottest_first(loads):
        need = loads[source] - threshold
        own = [rows[source * size + i] for i in range(size)]
        for expert in hottest_first(own):
            available, holders = own[expert] - 1, {source}
            while need > 0:
                free = [r for r in range(num_ranks) if r not in holders and slots[r]]
                if not free:
                    break
                target = max(free, key=lambda r: (slack[r], -r))
                quota = min(need, slack[target], available)
                if quota < max(min_rows, 1):
                    break
                after[target] += quota
                after[source] -= quota
                slack[target] -= quota
                slots[target] -= 1
                holders.add(target)
                need -= quota
                available -= quota
        if need > 0:
            return None
    return after


def eplb(weight: list[int], num_redundant: int, num_ranks: int) -> list[list[int]]:
    """EPLB's replicate and pack of one layer: the experts of each rank."""
    copies = [1] * len(weight)
    experts = list(range(len(weight)))
    for _ in range(num_redundant):
        hot = max(range(len(weight)), key=lambda e: (weight[e] / copies[e], -e))
        copies[hot] += 1
        experts.append(hot)
    shares = [weight[e] / copies[e] for e in experts]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for copy in sorted(range(len(experts)), key=lambda c: (-shares[c], c)):
        free = [r for r in range(num_ranks) if len(ranks[r]) < len(experts) // num_ranks]
        target = min(free, key=lambda r: (load[r], r))
        ranks[target].append(experts[copy])
        load[target] += shares[copy]
    return ranks
