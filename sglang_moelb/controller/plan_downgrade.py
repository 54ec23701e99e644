"""Which experts run at low precision in a layer: the rule of the device plan in plain integers.

Equal to `kernels.plan_downgrade` (a test holds it so); it is what predicts a downgrade from loads
without a device. Source: ReaLB, arXiv 2604.19503, for Form.RANK; the other forms are ours.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_moelb.types import Form

ONE = 1_000_000  # factors and shares are integers of this unit


def plan_downgrade(
    rows_E: Sequence[int],
    vision_rows_E: Sequence[int],
    refused_rows_E: Sequence[int],
    *,
    num_ranks: int,
    capacity_factor: float,
    vision_share: float,
    form: int,
    low_cost: float = 0.66,
) -> list[int]:
    """1 for every expert that runs at low precision, else 0.

    Args:
        rows_E: rows that all ranks send to each expert, as Python integers.
        vision_rows_E: the vision rows among them.
        refused_rows_E: the rows among them of requests that refuse lossy levers.
        num_ranks: ranks, which hold equal runs of experts in order.
        capacity_factor, vision_share, form, low_cost: as in `kernels.plan_downgrade`.
    """
    num_experts, total = len(rows_E), sum(rows_E)
    size = num_experts // num_ranks
    capacity, share = round(capacity_factor * ONE), round(vision_share * ONE)
    saved = ONE - round(low_cost * ONE)

    def is_hot(rows: int, num_holders: int) -> bool:
        return rows * num_holders * ONE > capacity * total

    def is_vision(rows: int, vision_rows: int) -> bool:
        return vision_rows * ONE > share * max(rows, 1)

    low_E = [0] * num_experts
    for first in range(0, num_experts, size):
        experts = range(first, first + size)
        load = sum(rows_E[e] for e in experts)
        vision_load = sum(vision_rows_E[e] for e in experts)
        if not (is_hot(load, num_ranks) and is_vision(load, vision_load)):
            continue
        free = [e for e in experts if not refused_rows_E[e]]
        choices = [e for e in free if is_vision(rows_E[e], vision_rows_E[e])]
        if form == Form.RANK:
            lowered = free if len(free) == size else []
        elif form == Form.EXPERTS:
            lowered = [e for e in choices if is_hot(rows_E[e], num_experts)]
        else:
            lowered, time = [], ONE * load
            for e in sorted(choices, key=lambda e: -rows_E[e]):
                if time * num_ranks <= ONE * total:
                    break
                lowered.append(e)
                time -= saved * rows_E[e]
        for e in lowered:
            low_E[e] = 1
    return low_E
