"""`plan_cuts` equals a plain search for the bin where the room ends, dealt by the prefix rule.

Shape letters: R ranks, W row width, G groups, E experts, B bins.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout


@pytest.fixture
def plan_cuts(load_op: Callable) -> Callable:
    return load_op("plan_cuts")


def make_rows(histogram_REB: Tensor, protected_RE: Tensor) -> Tensor:
    num_ranks, num_experts, _ = histogram_REB.shape
    width = layout.row_width(num_experts, with_histogram=True)
    rows_RW = torch.zeros(num_ranks, width, dtype=torch.int32)
    layout.histogram_of(rows_RW, num_experts)[:] = histogram_REB
    counts_RE5 = layout.counts_of(rows_RW, num_experts)
    counts_RE5[..., layout.C_PROTECTED_AMOUNT] = protected_RE.int()
    counts_RE5[..., layout.C_CUTTABLE_AMOUNT] = histogram_REB.sum(-1).int()
    return rows_RW


def random_rows(num_ranks: int, num_experts: int, seed: int, largest: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_ranks, num_experts, layout.NUM_BINS)
    histogram_REB = torch.randint(0, largest, shape, generator=generator)
    histogram_REB[torch.rand(shape, generator=generator) < 0.7] = 0
    protected_RE = torch.randint(0, largest, shape[:2], generator=generator)
    return make_rows(histogram_REB.int(), protected_RE)


def loop_plan(
    rows_RW: Tensor, capacity_G: Tensor, my_rank: int, num_experts: int
) -> tuple[list[int], list[int]]:
    """What plan_cuts promises, in Python integers, one bin at a time."""
    rows, size = rows_RW.tolist(), num_experts // len(capacity_G)
    bins_at = layout.NUM_HEADER + num_experts * layout.NUM_COUNTS
    cut_bins, quotas = [], []
    for group, capacity in enumerate(capacity_G.tolist()):
        experts = range(group * size, (group + 1) * size)
        protected = sum(
            row[layout.NUM_HEADER + e * layout.NUM_COUNTS + layout.C_PROTECTED_AMOUNT]
            for row in rows
            for e in experts
        )
        left = max(0, capacity - protected)
        cut_bin, quota = -1, 0
        for b in reversed(range(layout.NUM_BINS)):
            amounts = [sum(row[bins_at + e * 64 + b] for e in experts) for row in rows]
            if sum(amounts) > left:
                cut_bin, total = b, sum(amounts)
                before = sum(amounts[:my_rank])
                through = before + amounts[my_rank]
                quota = left * through // total - left * before // total
                break
            left -= sum(amounts)
        cut_bins.append(cut_bin)
        quotas.append(quota)
    return cut_bins, quotas


def assert_plans(
    plan_cuts: Callable, rows_RW: Tensor, capacity_G: Tensor, my_rank: int, num_experts: int
) -> None:
    cut_bin_G, quota_G = plan_cuts(rows_RW, capacity_G, my_rank=my_rank, num_experts=num_experts)
    assert cut_bin_G.dtype == quota_G.dtype == torch.int32
    expected = loop_plan(rows_RW, capacity_G, my_rank, num_experts)
    assert (cut_bin_G.tolist(), quota_G.tolist()) == expected


def test_the_worked_example_of_the_docstring(plan_cuts: Callable) -> None:
    histogram_REB = torch.zeros(2, 1, layout.NUM_BINS, dtype=torch.int32)
    histogram_REB[:, 0, 40] = torch.tensor([4, 2])
    histogram_REB[:, 0, 20] = torch.tensor([6, 3])
    rows_RW = make_rows(histogram_REB, torch.zeros(2, 1))
    for rank, quota in enumerate((2, 1)):
        plan = plan_cuts(rows_RW, torch.tensor([9]), my_rank=rank, num_experts=1)
        assert [part.tolist() for part in plan] == [[20], [quota]]


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_a_search_bin_by_bin(plan_cuts: Callable, seed: int) -> None:
    pick = random.Random(seed)
    num_ranks, num_experts = pick.choice([(1, 4), (2, 8), (3, 6), (4, 16)])
    rows_RW = random_rows(num_ranks, num_experts, seed)
    for num_groups in (num_experts, num_experts // 2, 1):
        mean = int(layout.histogram_of(rows_RW, num_experts).sum()) // num_groups
        capacity_G = torch.tensor([pick.randrange(0, 2 * mean + 2) for _ in range(num_groups)])
        assert_plans(plan_cuts, rows_RW, capacity_G, pick.randrange(num_ranks), num_experts)


def test_64_ranks_and_256_experts(plan_cuts: Callable) -> None:
    rows_RW = random_rows(64, 256, seed=1, largest=5)
    capacity_G = torch.arange(64) * 300
    assert_plans(plan_cuts, rows_RW, capacity_G, 63, 256)


def test_the_quotas_of_all_ranks_sum_to_what_is_left_in_the_cut_bin(plan_cuts: Callable) -> None:
    rows_RW = random_rows(5, 4, seed=3)
    capacity_G = torch.tensor([700, 300, 0, 50])
    plans = [plan_cuts(rows_RW, capacity_G, my_rank=r, num_experts=4) for r in range(5)]
    histogram_REB = layout.histogram_of(rows_RW, 4)
    protected_E = layout.counts_of(rows_RW, 4)[..., layout.C_PROTECTED_AMOUNT].sum(0)
    for e in range(4):
        cut_bin = int(plans[0][0][e])
        assert all(int(cut_bin_G[e]) == cut_bin for cut_bin_G, _ in plans)
        quotas = [int(quota_G[e]) for _, quota_G in plans]
        room = max(0, int(capacity_G[e] - protected_E[e]))
        assert sum(quotas) == room - int(histogram_REB[:, e, cut_bin + 1 :].sum())
        assert all(q <= int(histogram_REB[r, e, cut_bin]) for r, q in enumerate(quotas))


def test_a_group_that_fits_exactly_is_not_cut_and_one_more_row_cuts_it(
    plan_cuts: Callable,
) -> None:
    rows_RW = random_rows(2, 2, seed=4)
    counts_RE5 = layout.counts_of(rows_RW, 2).long().sum(0)
    full_G = counts_RE5[:, layout.C_CUTTABLE_AMOUNT] + counts_RE5[:, layout.C_PROTECTED_AMOUNT]
    cut_bin_G, quota_G = plan_cuts(rows_RW, full_G, my_rank=0, num_experts=2)
    assert cut_bin_G.tolist() == [-1, -1]
    assert quota_G.tolist() == [0, 0]
    cut_bin_G, _ = plan_cuts(rows_RW, full_G - 1, my_rank=0, num_experts=2)
    assert (cut_bin_G >= 0).all()


def test_capacity_below_the_protected_rows_cuts_all_others(plan_cuts: Callable) -> None:
    rows_RW = random_rows(2, 3, seed=5)
    cut_bin_G, quota_G = plan_cuts(rows_RW, torch.zeros(3).long(), my_rank=1, num_experts=3)
    histogram_EB = layout.histogram_of(rows_RW, 3).sum(0)
    for e in range(3):
        assert histogram_EB[e, int(cut_bin_G[e]) + 1 :].sum() == 0
    assert quota_G.tolist() == [0, 0, 0]


def test_idle_ranks_take_part_and_get_no_quota(plan_cuts: Callable) -> None:
    rows_RW = random_rows(3, 4, seed=6)
    rows_RW[1] = 0
    assert_plans(plan_cuts, rows_RW, torch.full((2,), 100), 1, 4)
    _, quota_G = plan_cuts(rows_RW, torch.full((2,), 100), my_rank=1, num_experts=4)
    assert quota_G.tolist() == [0, 0]
    cut_bin_G, _ = plan_cuts(
        torch.zeros_like(rows_RW), torch.zeros(4).long(), my_rank=0, num_experts=4
    )
    assert cut_bin_G.tolist() == [-1] * 4


def test_amounts_beyond_32_bits_are_exact(plan_cuts: Callable) -> None:
    largest = (1 << 27) - 1  # 16,384 tokens with 32 columns of the amount 256
    histogram_REB = torch.zeros(64, 1, layout.NUM_BINS, dtype=torch.int32)
    histogram_REB[:, :, 9] = largest
    rows_RW = make_rows(histogram_REB, torch.zeros(64, 1))
    for my_rank in (0, 31, 63):
        assert_plans(plan_cuts, rows_RW, torch.tensor([64 * largest - 12345]), my_rank, 1)


def test_shapes_that_do_not_belong_together_are_refused(plan_cuts: Callable) -> None:
    rows_RW = random_rows(2, 4, seed=7)
    with pytest.raises(ValueError, match="4 experts cannot be split evenly in 3 groups"):
        plan_cuts(rows_RW, torch.zeros(3).long(), my_rank=0, num_experts=4)
    with pytest.raises(ValueError, match="my_rank 2 is not one of the 2 rows"):
        plan_cuts(rows_RW, torch.zeros(2).long(), my_rank=2, num_experts=4)
    with pytest.raises(ValueError, match="has no histogram"):
        plan_cuts(rows_RW[:, :28], torch.zeros(2).long(), my_rank=0, num_experts=4)
