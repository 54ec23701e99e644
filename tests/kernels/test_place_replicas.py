"""`place_replicas` on the device equals the planner of the controller, number by number.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_moelb.controller import place_replicas as planner
from sglang_moelb.controller.place_replicas import CopyCosts
from sglang_moelb.kernels import row_layout as layout
from tests.controller.replica_cases import one_hot, rank_skewed, zipf

COSTS = (
    CopyCosts(),
    CopyCosts(min_rows=300),
    CopyCosts(send_rows=200, receive_rows=90, min_rows=64),
)


@pytest.fixture
def place_replicas(load_op: Callable) -> Callable:
    return load_op("place_replicas")


def make_rows(rows_RE: np.ndarray) -> Tensor:
    """Rows as they are exchanged; a third of them, rounded down, are vision rows."""
    num_ranks, num_experts = rows_RE.shape
    width = layout.row_width(num_experts, with_histogram=False)
    rows_RW = torch.full((num_ranks, width), 7, dtype=torch.int32)  # what must not be read
    counts_RE5 = layout.counts_of(rows_RW, num_experts)
    total_RE = torch.from_numpy(rows_RE.astype(np.int32))
    counts_RE5[..., layout.C_VISION_ROWS] = total_RE // 3
    counts_RE5[..., layout.C_TEXT_ROWS] = total_RE - total_RE // 3
    return rows_RW


def assert_same(
    place_replicas: Callable, rows_RE: np.ndarray, num_slots: int, costs: CopyCosts
) -> None:
    expected = planner.place_replicas(rows_RE, num_slots=num_slots, costs=costs)
    slots_RS, quota_ER, times_2 = place_replicas(
        make_rows(rows_RE),
        num_experts=rows_RE.shape[1],
        num_slots=num_slots,
        send_rows=costs.send_rows,
        receive_rows=costs.receive_rows,
        min_rows=costs.min_rows,
    )
    assert slots_RS.dtype == quota_ER.dtype == torch.int32
    assert times_2.tolist() == [expected.before_rows, expected.after_rows]
    assert slots_RS.tolist() == expected.slots_RS.tolist()
    assert quota_ER.tolist() == expected.quota_ER.tolist()


def test_the_worked_example_of_the_docstring(place_replicas: Callable) -> None:
    rows_RW = make_rows(np.array([[20, 10, 5, 5], [30, 20, 5, 5]]))
    slots_RS, quota_ER, times_2 = place_replicas(rows_RW, num_experts=4, num_slots=1)
    assert slots_RS.tolist() == [[-1], [0]]
    assert quota_ER.tolist() == [[20, 30], [30, 0], [0, 10], [0, 10]]
    assert times_2.tolist() == [80, 50]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("skew", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("num_experts", "num_slots"), [(128, 8), (256, 16)])
def test_rank_skews_at_ep_4(
    place_replicas: Callable, num_experts: int, num_slots: int, skew: float, costs: CopyCosts
) -> None:
    assert_same(place_replicas, rank_skewed(4, num_experts, skew, seed=1), num_slots, costs)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "num_slots"), [(8, 256, 4), (32, 128, 2), (64, 256, 4)]
)
def test_larger_groups_of_ranks(
    place_replicas: Callable, num_ranks: int, num_experts: int, num_slots: int
) -> None:
    for rows_RE in (
        one_hot(num_ranks, num_experts, 0.3, seed=9),
        zipf(num_ranks, num_experts, 0.8, mixed=False),
    ):
        assert_same(place_replicas, rows_RE, num_slots, COSTS[1])


@pytest.mark.parametrize("seed", range(14))
def test_random_small_cases_with_sizes_that_are_no_powers_of_2(
    place_replicas: Callable, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, num_local = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    shape = (num_ranks, num_ranks * num_local)
    rows_RE = rng.integers(0, 40, shape) * (rng.random(shape) < 0.6)
    rows_RE[:, rng.integers(shape[1])] *= rng.choice((0, 1, 40))
    rows_RE[rng.integers(num_ranks)] = 0
    costs = CopyCosts(
        send_rows=int(rng.choice((0, 3, 50))),
        receive_rows=int(rng.choice((0, 2, 30))),
        min_rows=int(rng.choice((1, 5, 80))),
    )
    assert_same(place_replicas, rows_RE, int(rng.integers(0, 4)), costs)


def test_ties_are_broken_by_index_on_every_rank_alike(place_replicas: Callable) -> None:
    equal = np.zeros((8, 32), dtype=np.int64)
    equal[:, :8] = 100  # ranks 0 and 1 are equally hot, and so are their experts
    assert_same(place_replicas, equal, 2, CopyCosts())


def test_nothing_to_plan(place_replicas: Callable) -> None:
    idle = np.zeros((4, 16), dtype=np.int64)
    assert_same(place_replicas, idle, 4, CopyCosts())
    one = idle.copy()
    one[2, 5] = 1
    assert_same(place_replicas, one, 4, CopyCosts())
    assert_same(place_replicas, rank_skewed(4, 16, 3.0), 0, CopyCosts())
    assert_same(place_replicas, rank_skewed(1, 16, 1.0), 4, CopyCosts())


def test_all_rows_on_one_expert(place_replicas: Callable) -> None:
    rows_RE = np.zeros((8, 64), dtype=np.int64)
    rows_RE[3, 17] = 80_001
    assert_same(place_replicas, rows_RE, 1, CopyCosts())


def test_many_rows_stay_exact(place_replicas: Callable) -> None:
    rows_RE = np.zeros((4, 8), dtype=np.int64)
    rows_RE[:, 0] = (1 << 28) + 12_345
    rows_RE[:, 5] = 1 << 26
    assert_same(place_replicas, rows_RE, 2, CopyCosts(send_rows=1000, min_rows=77))


def test_rows_may_be_a_slice_of_wider_ones(place_replicas: Callable) -> None:
    rows_RE = rank_skewed(4, 16, 3.0)
    rows_RW = make_rows(rows_RE)
    wide = torch.full((4, rows_RW.shape[1] + 9), -5, dtype=torch.int32)
    wide[:, : rows_RW.shape[1]] = rows_RW
    plans = [
        place_replicas(rows, num_experts=16, num_slots=2)
        for rows in (rows_RW, wide[:, : rows_RW.shape[1]], rows_RW.t().contiguous().t())
    ]
    for plan in plans[1:]:
        assert all(torch.equal(a, b) for a, b in zip(plans[0], plan, strict=True))


def test_sizes_and_costs_out_of_range_are_refused(place_replicas: Callable) -> None:
    rows_RW = make_rows(np.ones((4, 8), dtype=np.int64))
    with pytest.raises(ValueError, match="6 experts cannot be split evenly over 4 ranks"):
        place_replicas(rows_RW, num_experts=6, num_slots=1)
    with pytest.raises(ValueError, match="256 slots a rank: give 0 to 255"):
        place_replicas(rows_RW, num_experts=8, num_slots=256)
    with pytest.raises(ValueError, match="do not hold 64 experts"):
        place_replicas(rows_RW, num_experts=64, num_slots=1)
    with pytest.raises(ValueError, match="min_rows at least 1"):
        place_replicas(rows_RW, num_experts=8, num_slots=1, min_rows=0)
