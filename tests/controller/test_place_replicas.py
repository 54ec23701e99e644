"""The replica planner: exact sums, limits kept, never worse, near the best there is.

Shape letters: E logical experts, R ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from sglang_moelb.controller.place_replicas import (
    NUM_LIMITS,
    CopyCosts,
    ReplicaPlan,
    deal_rows,
    limits,
    place_replicas,
)
from sglang_moelb.types import IntArray
from tests.controller.replica_cases import (
    best_time,
    loop_plan,
    one_hot,
    rank_skewed,
    rank_times,
    routed,
    small_cases,
    zipf,
)

Case = tuple[IntArray, int, CopyCosts]
SIZES = [(4, 128), (8, 128), (8, 256), (32, 128), (32, 256), (64, 128), (64, 256)]


def left_over(plan: ReplicaPlan) -> float:
    """Rows of the busiest rank over the mean."""
    return float(plan.rows_R.max() / plan.rows_R.mean())


@given(small_cases())
@settings(max_examples=300)
def test_a_plan_computes_every_row_once_where_its_expert_is(case: Case) -> None:
    rows_RE, num_slots, costs = case
    plan = place_replicas(rows_RE, num_slots=num_slots, costs=costs)
    num_ranks, num_experts = rows_RE.shape
    assert plan.quota_ER.sum(axis=1).tolist() == rows_RE.sum(axis=0).tolist()
    assert (plan.quota_ER >= 0).all()
    assert plan.slots_RS.shape == (num_ranks, num_slots)
    for expert in range(num_experts):
        home = expert * num_ranks // num_experts
        for rank in set(range(num_ranks)) - {home}:
            copies = plan.slots_RS[rank].tolist().count(expert)
            assert copies == (plan.quota_ER[expert, rank] > 0)
        assert expert not in plan.slots_RS[home]


@given(small_cases())
def test_every_copy_gets_the_minimum_and_more_than_it_costs(case: Case) -> None:
    rows_RE, num_slots, costs = case
    plan = place_replicas(rows_RE, num_slots=num_slots, costs=costs)
    for rank, slots in enumerate(plan.slots_RS.tolist()):
        for expert in slots:
            assert expert < 0 or plan.quota_ER[expert, rank] >= costs.min_rows
            assert expert < 0 or plan.quota_ER[expert, rank] > costs.send_rows


@given(small_cases())
@settings(max_examples=300)
def test_a_plan_is_never_slower_than_none_and_keeps_its_bound(case: Case) -> None:
    rows_RE, num_slots, costs = case
    plan = place_replicas(rows_RE, num_slots=num_slots, costs=costs)
    load_R = rows_RE.sum(axis=0).reshape(len(rows_RE), -1).sum(axis=1)
    assert plan.before_rows == load_R.max()
    assert max(rank_times(plan, costs)) <= plan.after_rows <= plan.before_rows
    assert plan.num_copies == 0 or plan.after_rows < plan.before_rows


@given(small_cases())
def test_a_plan_is_its_rule_in_plain_loops(case: Case) -> None:
    rows_RE, num_slots, costs = case
    plan = place_replicas(rows_RE, num_slots=num_slots, costs=costs)
    slots, quotas = loop_plan(rows_RE, num_slots, costs)
    assert plan.slots_RS.tolist() == slots
    assert plan.quota_ER.tolist() == quotas


@given(small_cases())
@settings(max_examples=300)
def test_the_deal_adds_up_and_keeps_rows_at_their_source_where_it_can(case: Case) -> None:
    rows_RE, num_slots, costs = case
    quota_ER = place_replicas(rows_RE, num_slots=num_slots, costs=costs).quota_ER
    share_RER = deal_rows(rows_RE, quota_ER)
    assert (share_RER >= 0).all()
    assert (share_RER.sum(axis=0) == quota_ER).all()
    assert (share_RER.sum(axis=2) == rows_RE).all()
    for rank in range(len(rows_RE)):
        kept_E = np.minimum(rows_RE[rank], quota_ER[:, rank])
        assert share_RER[rank, :, rank].tolist() == kept_E.tolist()


def test_the_same_counts_give_the_same_plan_whatever_their_memory_layout() -> None:
    rows_RE = rank_skewed(8, 128, 3.0)
    plans = [
        place_replicas(rows, num_slots=4)
        for rows in (rows_RE, rows_RE.copy(), np.asfortranarray(rows_RE), rows_RE.astype(np.int32))
    ]
    assert len({(p.slots_RS.tobytes(), p.quota_ER.tobytes(), p.after_rows) for p in plans}) == 1


@pytest.mark.parametrize(("num_ranks", "num_experts"), SIZES)
@pytest.mark.parametrize("skew", [1.2, 2.0, 3.0, 4.0])
def test_rank_skews_up_to_4_are_balanced_to_1_percent_with_8_slots(
    num_ranks: int, num_experts: int, skew: float
) -> None:
    for seed in range(3):
        rows_RE = rank_skewed(num_ranks, num_experts, skew, seed)
        assert left_over(place_replicas(rows_RE, num_slots=8)) <= 1.01


@pytest.mark.parametrize("skew", [1.2, 2.0, 3.0, 4.0])
def test_rank_skews_of_64_experts_a_rank_are_balanced_to_1_percent_with_16_slots(
    skew: float,
) -> None:
    for seed in range(3):
        rows_RE = rank_skewed(4, 256, skew, seed)
        assert left_over(place_replicas(rows_RE, num_slots=16)) <= 1.01


def test_eight_slots_are_too_few_for_64_experts_of_a_rank_at_skew_4() -> None:
    assert left_over(place_replicas(rank_skewed(4, 256, 4.0), num_slots=8)) > 1.2


@pytest.mark.parametrize(("num_ranks", "num_experts"), SIZES)
@pytest.mark.parametrize("num_slots", [4, 8])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_an_expert_with_up_to_30_percent_is_balanced_to_1_percent(
    num_ranks: int, num_experts: int, num_slots: int, share: float
) -> None:
    for seed in (0, 77):
        rows_RE = one_hot(num_ranks, num_experts, share, seed)
        assert left_over(place_replicas(rows_RE, num_slots=num_slots)) <= 1.01


@pytest.mark.parametrize(("num_ranks", "num_experts"), SIZES)
@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.2])
@pytest.mark.parametrize("mixed", [True, False])
def test_zipf_routings_are_balanced_to_1_percent_with_8_slots(
    num_ranks: int, num_experts: int, alpha: float, mixed: bool
) -> None:
    rows_RE = zipf(num_ranks, num_experts, alpha, mixed=mixed)
    assert left_over(place_replicas(rows_RE, num_slots=8)) <= 1.01


@pytest.mark.parametrize(("num_ranks", "num_experts"), SIZES)
@pytest.mark.parametrize("skew", [2.0, 4.0])
def test_a_minimum_of_512_rows_a_copy_costs_less_than_2_percent(
    num_ranks: int, num_experts: int, skew: float
) -> None:
    rows_RE = rank_skewed(num_ranks, num_experts, skew)
    plan = place_replicas(rows_RE, num_slots=8, costs=CopyCosts(min_rows=512))
    assert left_over(plan) <= 1.02


@pytest.mark.parametrize(
    ("num_ranks", "size", "num_slots"),
    [(2, 2, 1), (2, 3, 2), (3, 1, 1), (3, 2, 1), (3, 1, 2), (4, 1, 1)],
)
@pytest.mark.parametrize(
    "costs", [CopyCosts(), CopyCosts(send_rows=5, receive_rows=3, min_rows=10)]
)
def test_small_plans_are_within_half_of_the_best_and_a_tenth_on_average(
    num_ranks: int, size: int, num_slots: int, costs: CopyCosts
) -> None:
    rng = np.random.default_rng(num_ranks * 10 + size)
    ratios = []
    for _ in range(20):
        heavy_E = rng.pareto(1.0, num_ranks * size) * 30 + rng.integers(0, 30, num_ranks * size)
        rows_RE = np.zeros((num_ranks, num_ranks * size), dtype=np.int64)
        rows_RE[0] = np.minimum(heavy_E, 1000)
        plan = place_replicas(rows_RE, num_slots=num_slots, costs=costs)
        best = best_time(rows_RE, num_slots, costs)
        ratios.append(max(rank_times(plan, costs)) / max(best, 1))
    assert min(ratios) >= 1
    assert max(ratios) <= 1.5
    assert np.mean(ratios) <= 1.1


def test_all_rows_on_one_expert_are_spread_over_all_ranks() -> None:
    rows_RE = np.zeros((8, 64), dtype=np.int64)
    rows_RE[3, 17] = 80_001
    plan = place_replicas(rows_RE, num_slots=1)
    assert plan.rows_R.max() == 10_001
    assert plan.num_copies == 7


def test_more_hot_experts_than_slots_still_help_as_far_as_slots_go() -> None:
    rows_RE = np.zeros((4, 64), dtype=np.int64)
    rows_RE[:, :16] = 100  # rank 0 holds 16 equally hot experts; 3 slots elsewhere
    plan = place_replicas(rows_RE, num_slots=1)
    assert plan.rows_R.tolist() == [16 * 400 - 3 * 400, 400, 400, 400]


def test_without_slots_or_rows_or_other_ranks_nothing_is_copied() -> None:
    rows_RE = rank_skewed(4, 16, 3.0)
    idle = np.zeros((4, 16), dtype=np.int64)
    for rows, num_slots in ((rows_RE, 0), (idle, 4), (rows_RE[:1], 4)):
        plan = place_replicas(rows, num_slots=num_slots)
        assert plan.num_copies == 0
        assert plan.after_rows == plan.before_rows
        assert plan.quota_ER.sum() == rows.sum()


def test_one_token_and_a_rank_without_tokens_take_part() -> None:
    one = np.zeros((4, 8), dtype=np.int64)
    one[2, [0, 1]] = 1  # its two rows meet on rank 0, and may be split
    plan = place_replicas(one, num_slots=1)
    assert plan.rows_R.max() == 1
    assert deal_rows(one, plan.quota_ER)[[0, 1, 3]].sum() == 0
    idle_source = rank_skewed(4, 16, 3.0)
    idle_source[1] = 0
    plan = place_replicas(idle_source, num_slots=8)
    assert left_over(plan) <= 1.01
    assert deal_rows(idle_source, plan.quota_ER)[1].sum() == 0


def test_a_copy_that_costs_more_than_it_saves_is_not_made() -> None:
    rows_RE = np.array([[60, 0], [40, 0]])
    assert place_replicas(rows_RE, num_slots=1).rows_R.tolist() == [50, 50]
    dear = CopyCosts(send_rows=30, receive_rows=30)
    plan = place_replicas(rows_RE, num_slots=1, costs=dear)
    assert 80 <= max(rank_times(plan, dear)) < 100  # 50 rows and 30 for the copy are the best
    for costs in (CopyCosts(receive_rows=100), CopyCosts(send_rows=100)):
        assert place_replicas(rows_RE, num_slots=1, costs=costs).num_copies == 0


def test_an_exporter_that_must_lose_less_than_the_minimum_loses_the_minimum() -> None:
    rows_RE = np.zeros((3, 3), dtype=np.int64)
    rows_RE[0] = [53, 50, 20]  # the mean is 41: rank 0 must lose 12, rank 1 only 9
    plan = place_replicas(rows_RE, num_slots=2, costs=CopyCosts(min_rows=10))
    assert plan.rows_R.tolist() == [42, 40, 41]


def test_the_limits_go_from_the_mean_to_the_busiest_by_thirds_and_halves() -> None:
    assert limits(100, 100).tolist() == [100] * NUM_LIMITS
    assert limits(1100, 100)[-5:].tolist() == [350, 475, 600, 850, 1100]
    assert limits(1100, 100)[0] == 100
    assert (np.diff(limits(10**9, 1)) >= 0).all()


def test_costs_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 rows, and min_rows at least 1"):
        CopyCosts(min_rows=0)


def test_sizes_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="6 experts cannot be split evenly over 4 ranks"):
        place_replicas(np.zeros((4, 6), dtype=np.int64), num_slots=1)
    with pytest.raises(ValueError, match="256 slots a rank: give 0 to 255"):
        place_replicas(np.zeros((4, 8), dtype=np.int64), num_slots=256)
    with pytest.raises(ValueError, match="257 ranks"):
        place_replicas(np.zeros((257, 257), dtype=np.int64), num_slots=1)


def test_the_worked_examples_of_the_docstrings() -> None:
    plan = place_replicas(np.array([[20, 10, 5, 5], [30, 20, 5, 5]]), num_slots=1)
    assert plan.slots_RS.tolist() == [[-1], [0]]
    assert plan.quota_ER.tolist() == [[20, 30], [30, 0], [0, 10], [0, 10]]
    share_RER = deal_rows(np.array([[6], [2]]), np.array([[3, 5]]))
    assert share_RER.tolist() == [[[3, 3]], [[0, 2]]]


def test_a_weighted_routing_of_many_seeds_never_exceeds_1_percent_at_ep_4() -> None:
    rng = np.random.default_rng(5)
    for seed in range(40):
        weights_E = np.exp(rng.normal(size=128) * rng.uniform(0.2, 2.0))
        assert left_over(place_replicas(routed(weights_E, 4, seed), num_slots=8)) <= 1.01
