"""Count, plan and cut together hold every capacity over all ranks, ties included.

The ranks are simulated; `cut_tokens` is the implementation under test, the others are references.
Shape letters: T tokens, C columns, G groups, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels.count_experts.ref import count_experts
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.plan_cuts.ref import plan_cuts
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED
from sglang_moelb.kernels.testing import Routing, random_routing
from sglang_moelb.types import Metric, Preference

RULE = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)


@pytest.fixture
def cut_tokens(load_op: Callable) -> Callable:
    return load_op("cut_tokens")


def simulate(
    cut_tokens: Callable, cases: Sequence[Routing], capacity_G: Tensor, experts: int, topk: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Count, plan and cut on every rank; the kept ids and the keys of each."""
    counted = [
        count_experts(
            case.ids_TC,
            case.weights_TC,
            case.flags_T,
            case.amounts_T,
            num_experts=experts,
            topk=topk,
            key_rule=RULE,
        )
        for case in cases
    ]
    rows_RW = torch.stack([row_W for row_W, _ in counted])
    kept = []
    for rank, case in enumerate(cases):
        plan = plan_cuts(rows_RW, capacity_G, my_rank=rank, num_experts=experts)
        args = (case.ids_TC, case.weights_TC, counted[rank][1], case.flags_T, case.amounts_T, *plan)
        kept.append(cut_tokens(*args, num_experts=experts, topk=topk)[0])
    return kept, [keys_TC for _, keys_TC in counted]


def group_amounts(
    cases: Sequence[Routing], ids: Sequence[Tensor], experts: int, groups: int, protected: bool
) -> list[int]:
    """Amounts of the rows in `ids`, by group, of tokens that are protected or are not."""
    sums = [0] * groups
    for case, ids_TC in zip(cases, ids, strict=True):
        for t, row in enumerate(ids_TC.tolist()):
            if bool(case.flags_T[t] & FLAG_PROTECTED) != protected:
                continue
            for e in row:
                if e >= 0:
                    amount = 1 if case.amounts_T is None else int(case.amounts_T[t])
                    sums[e // (experts // groups)] += amount
    return sums


@pytest.mark.parametrize("num_groups", [8, 4])
@pytest.mark.parametrize("skew", [0.0, 3.0, 40.0])
def test_over_all_ranks_a_group_keeps_exactly_its_room(
    cut_tokens: Callable, skew: float, num_groups: int
) -> None:
    sizes = (50, 0, 1, 70)
    cases = [random_routing(n, 4, 8, seed=9, skew=skew) for n in sizes]
    for capacity in (0, 13, 40):
        capacity_G = torch.full((num_groups,), capacity)
        kept, _ = simulate(cut_tokens, cases, capacity_G, experts=8, topk=4)
        routed = [case.ids_TC for case in cases]
        protected = group_amounts(cases, routed, 8, num_groups, protected=True)
        total = group_amounts(cases, routed, 8, num_groups, protected=False)
        room = [max(0, capacity - amount) for amount in protected]
        assert group_amounts(cases, kept, 8, num_groups, protected=True) == protected
        assert group_amounts(cases, kept, 8, num_groups, protected=False) == [
            min(pair) for pair in zip(total, room, strict=True)
        ]


def test_over_all_ranks_weighted_groups_keep_at_most_their_room(cut_tokens: Callable) -> None:
    cases = [random_routing(n, 4, 8, seed=n, skew=3.0, weighted=True) for n in (50, 1, 70)]
    capacity_G = torch.full((4,), 9000)
    kept, _ = simulate(cut_tokens, cases, capacity_G, experts=8, topk=4)
    protected = group_amounts(cases, [c.ids_TC for c in cases], 8, 4, protected=True)
    amounts = group_amounts(cases, kept, 8, 4, protected=False)
    for amount, fixed in zip(amounts, protected, strict=True):
        assert amount <= max(0, 9000 - fixed)
    assert sum(amounts) > 0


def test_no_dropped_row_is_in_a_higher_bin_than_a_kept_row_of_its_group(
    cut_tokens: Callable,
) -> None:
    cases = [random_routing(n, 4, 8, seed=n, skew=2.0) for n in (60, 40)]
    kept, keys = simulate(cut_tokens, cases, torch.full((4,), 35), experts=8, topk=4)
    kept_bins: list[list[int]] = [[] for _ in range(4)]
    dropped_bins: list[list[int]] = [[] for _ in range(4)]
    for case, kept_TC, keys_TC in zip(cases, kept, keys, strict=True):
        for t, c in (case.ids_TC >= 0).nonzero().tolist():
            if not case.flags_T[t] & FLAG_PROTECTED:
                bins = kept_bins if kept_TC[t, c] >= 0 else dropped_bins
                bins[int(case.ids_TC[t, c]) // 2].append(int(keys_TC[t, c]) >> 10)
    assert any(dropped_bins)
    for kept_of, dropped_of in zip(kept_bins, dropped_bins, strict=True):
        assert not dropped_of or max(dropped_of) <= min(kept_of)
