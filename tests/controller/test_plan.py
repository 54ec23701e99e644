"""Laws of the planner. Shape letters: R source ranks, G groups, B bins."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.controller import plan
from sglang_moelb.types import IntArray

Load = tuple[IntArray, IntArray, IntArray]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    num_ranks, num_groups, num_bins = (draw(st.integers(1, 4)) for _ in range(3))
    amounts = st.integers(0, 9)

    def drawn(*shape: int) -> IntArray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(amounts, min_size=size, max_size=size))).reshape(shape)

    return drawn(num_ranks, num_groups, num_bins), drawn(num_groups), 6 * drawn(num_groups)


def kept_by_rank(cuttable_RGB: IntArray, protected_G: IntArray, capacity_G: IntArray) -> IntArray:
    """Amounts that each rank keeps by its own plan, [R, G] without the protected."""
    kept_RG = np.zeros(cuttable_RGB.shape[:2], dtype=np.int64)
    for rank, mine_GB in enumerate(cuttable_RGB):
        bins_G, quotas_G = plan.plan_cuts(cuttable_RGB, protected_G, capacity_G, rank)
        for group, (cut_bin, quota) in enumerate(zip(bins_G, quotas_G, strict=True)):
            kept_RG[rank, group] = mine_GB[group, cut_bin + 1 :].sum() + quota
    return kept_RG


def brute_force(amounts_RB: IntArray, room: int) -> tuple[int, list[int]]:
    """Cut bin and quotas of one group, amount by amount from the largest bin down."""
    if amounts_RB.sum() <= room:
        return -1, [0] * len(amounts_RB)
    left = room
    for cut_bin in reversed(range(amounts_RB.shape[1])):
        held = [int(h) for h in amounts_RB[:, cut_bin]]
        if sum(held) > left:
            break
        left -= sum(held)
    until = list(accumulate(held, initial=0))
    shares = [left * c // until[-1] for c in until]
    return cut_bin, [after - before for before, after in pairwise(shares)]


def test_the_worked_example_of_the_docstring() -> None:
    cuttable_RGB = np.array([[[4, 1]], [[2, 2]]])
    plans = [plan.plan_cuts(cuttable_RGB, np.array([0]), np.array([6]), rank) for rank in (0, 1)]
    assert [(int(b[0]), int(q[0])) for b, q in plans] == [(0, 2), (0, 1)]


@given(loads())
def test_all_ranks_together_keep_all_that_finds_room_and_no_more(load: Load) -> None:
    cuttable_RGB, protected_G, capacity_G = load
    total_G = cuttable_RGB.sum(axis=(0, 2))
    kept_G = kept_by_rank(*load).sum(axis=0)
    assert kept_G.tolist() == [
        min(t, max(0, c - p)) for t, c, p in zip(total_G, capacity_G, protected_G, strict=True)
    ]
    expected_G = plan.kept_amount(total_G, protected_G, capacity_G)
    assert (kept_G + protected_G).tolist() == expected_G.tolist()


@given(loads())
def test_plans_equal_a_brute_force(load: Load) -> None:
    cuttable_RGB, protected_G, capacity_G = load
    for rank in range(len(cuttable_RGB)):
        bins_G, quotas_G = plan.plan_cuts(cuttable_RGB, protected_G, capacity_G, rank)
        for group in range(len(protected_G)):
            room = max(0, int(capacity_G[group] - protected_G[group]))
            cut_bin, quotas = brute_force(cuttable_RGB[:, group], room)
            assert (bins_G[group], quotas_G[group]) == (cut_bin, quotas[rank])


@given(loads())
def test_a_quota_never_exceeds_what_the_rank_holds_in_the_cut_bin(load: Load) -> None:
    cuttable_RGB, protected_G, capacity_G = load
    for rank, mine_GB in enumerate(cuttable_RGB):
        bins_G, quotas_G = plan.plan_cuts(cuttable_RGB, protected_G, capacity_G, rank)
        held_G = np.take_along_axis(mine_GB, np.maximum(bins_G, 0)[:, None], axis=1)[:, 0]
        assert (quotas_G >= 0).all()
        assert (quotas_G <= held_G).all()


def test_quotas_are_exact_where_a_product_passes_63_bits() -> None:
    cuttable_RGB = np.full((2, 1, 1), 1 << 33, dtype=np.int64)
    capacity_G = np.array([(1 << 33) + 1])
    quotas = [int(plan.plan_cuts(cuttable_RGB, np.array([0]), capacity_G, r)[1][0]) for r in (0, 1)]
    assert quotas == [1 << 32, (1 << 32) + 1]


def test_narrow_integers_give_the_same_plan_as_wide_ones() -> None:
    wide_RGB = np.full((2, 1, 2), 2_000_000_000, dtype=np.int64)
    args = np.array([0]), np.array([5_000_000_000]), 1
    narrow, wide = (plan.plan_cuts(wide_RGB.astype(t), *args) for t in (np.int32, np.int64))
    assert [a.tolist() for a in narrow] == [a.tolist() for a in wide] == [[0], [500_000_000]]


@pytest.mark.parametrize(
    ("factor", "num_rows", "num_groups", "expected"),
    [
        (1.25, 100, 8, 15),
        (1.1, 100, 10, 11),  # 11.000000000000002 or 10.999999999999998, by the order of operations
        (0.29, 100, 1, 29),  # 28.999999999999996 without the nudge
        (0.01, 10, 8, 1),
        (2.0, 0, 8, 0),
    ],
)
def test_capacity_is_floored_and_at_least_one_row(
    factor: float, num_rows: int, num_groups: int, expected: int
) -> None:
    assert plan.capacity_rows(factor, num_rows, num_groups) == expected


def test_classes_change_exactly_past_six_and_four_tenths() -> None:
    vision_G = np.array([6, 7, 4, 3, 0, 600_000_001])
    rows_G = np.array([10, 10, 10, 10, 0, 1_000_000_000])
    assert plan.expert_classes(vision_G, rows_G).tolist() == [0, 1, 0, -1, 0, 1]


def test_macs_moves_capacity_towards_the_modality_that_weighs_more() -> None:
    classes_G = np.array([1, 0, -1])
    vision_heavy = plan.macs_capacity(25_600, 75, 100, classes_G, 0.5)
    assert vision_heavy.tolist() == [28_800, 25_600, 22_400]  # 1 + 0.5 * m * 0.25
    assert plan.macs_capacity(25_600, 25, 100, classes_G, 0.5).tolist() == [22_400, 25_600, 28_800]
    assert plan.macs_capacity(25_600, 50, 100, classes_G, 1.0).tolist() == [25_600] * 3


def test_macs_without_rows_or_strength_is_the_base() -> None:
    classes_G = np.array([1, 0, -1])
    assert plan.macs_capacity(0, 0, 0, classes_G, 0.5).tolist() == [0, 0, 0]
    assert plan.macs_capacity(1000, 90, 100, classes_G, 0.0).tolist() == [1000] * 3


@given(
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
    st.floats(0, 1),
)
def test_macs_equals_its_documented_integers_and_keeps_its_floor(
    base: int, vision: int, text: int, rho: float
) -> None:
    amount = vision + text
    share = (vision << 16) // amount if amount else 1 << 15
    capacity_G = plan.macs_capacity(base, vision, amount, np.array([-1, 0, 1]), rho)
    for m, capacity in zip((-1, 0, 1), capacity_G, strict=True):
        scale = 65536 + ((m * int(rho * 65536 + 0.5) * (share - 32768)) >> 16)
        assert capacity == max((base * scale) >> 16, base >> 2)
    assert (capacity_G >= base // 4).all()
