"""Laws of the window of passes. Shape letters: L MoE layers, R ranks."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_moelb.controller import load
from sglang_moelb.types import Topology

from .world import BALANCED, MILD, SKEWED, TOPOLOGY, record


def loads(*passes: tuple[int, ...]) -> list[load.PassLoad]:
    return [load.load_of(record(rows_E), TOPOLOGY) for rows_E in passes]


def test_balance_is_the_fullest_rank_over_the_mean() -> None:
    assert load.balance(np.array([[6, 2], [5, 5], [0, 0]])).tolist() == [1.5, 1.0, 1.0]


def test_balance_of_one_rank_is_perfect() -> None:
    one_rank = Topology(num_layers=2, num_experts=8, num_ranks=1, topk=2)
    one = load.load_of(record(SKEWED, topology=one_rank), one_rank)
    assert one.balance_L.tolist() == [1.0, 1.0]


def test_all_rows_on_one_expert_are_as_unbalanced_as_there_are_ranks() -> None:
    assert loads((8000, 0, 0, 0, 0, 0, 0, 0))[0].balance_L.tolist() == [4.0, 4.0]


def test_scaling_the_load_scales_rows_and_keeps_balance() -> None:
    small, large = (load.load_of(record(SKEWED, scale=s), TOPOLOGY) for s in (1, 3))
    assert (large.rows_LR == 3 * small.rows_LR).all()
    assert (large.balance_L == small.balance_L).all()


def test_a_hot_spot_that_moves_between_ranks_stays_visible() -> None:
    moving = loads(SKEWED, SKEWED[2:] + SKEWED[:2])
    assert load.mean_balance(moving, 2).tolist() == pytest.approx([2.4, 2.4])


def test_decode_idle_small_and_empty_passes_do_not_enter() -> None:
    assert load.enters(record(BALANCED), min_batch_tokens=4000)
    assert not load.enters(record(BALANCED), min_batch_tokens=4001)
    assert not load.enters(record(BALANCED, phase="decode"), min_batch_tokens=0)
    assert not load.enters(record(BALANCED, phase="idle"), min_batch_tokens=0)
    assert not load.enters(record((0,) * 8), min_batch_tokens=0)


def test_confidence_grows_with_passes() -> None:
    values = [load.confidence(loads(*[SKEWED] * n)) for n in range(6)]
    assert values == sorted(set(values))
    assert values[0] == 0.0
    assert values[2] == 0.5


def test_confidence_falls_with_variance() -> None:
    steady = load.confidence(loads(*[SKEWED] * 4))
    uneven = load.confidence(loads(SKEWED, BALANCED, SKEWED, BALANCED))
    assert uneven < steady


@pytest.mark.parametrize("num_new", [3, 4, 20])
@pytest.mark.parametrize("num_before", [1, 4, 12])
def test_a_load_more_skewed_than_all_before_is_a_new_one_from_its_third_pass(
    num_before: int, num_new: int
) -> None:
    before = [(MILD, BALANCED)[i % 2] for i in range(num_before)]
    assert load.first_of_new(loads(*before, *[SKEWED] * (num_new - 1))) == (
        num_before if num_new > 3 else 0
    )
    assert load.first_of_new(loads(*before, *[SKEWED] * num_new)) == num_before


def test_passes_twice_as_large_as_all_before_are_a_new_load_whatever_their_skew() -> None:
    small = [load.load_of(record(SKEWED), TOPOLOGY)] * 8
    for scale, first in ((1, 0), (2, 8)):
        large = [load.load_of(record(BALANCED, scale=scale), TOPOLOGY)] * 3
        assert load.first_of_new(small + large) == first


@pytest.mark.parametrize(
    "passes",
    [
        [SKEWED] * 8,
        [SKEWED] * 8 + [BALANCED] * 8,
        [BALANCED] * 8 + [SKEWED] * 2,
        [SKEWED] + [BALANCED] * 8 + [SKEWED] * 8,
        [BALANCED] * 8 + [SKEWED] * 3 + [BALANCED],
        [SKEWED] * 3,
        [],
    ],
    ids=["steady", "lighter", "too few", "seen before", "gone again", "all", "none"],
)
def test_a_load_that_is_steady_lighter_seen_before_or_gone_begins_nothing(
    passes: list[tuple[int, ...]],
) -> None:
    assert load.first_of_new(loads(*passes)) == 0


def test_the_newest_of_several_loads_counts() -> None:
    between = (1500, 1500, 900, 900, 800, 800, 800, 800)  # rank 0 has 1.5 times the mean
    passes = loads(*[BALANCED] * 4, *[between] * 4, *[SKEWED] * 4)
    assert load.first_of_new(passes[:8]) == 4
    assert load.first_of_new(passes) == 8


def test_a_load_that_drifts_begins_nothing() -> None:
    drifting = [(1000 + 10 * i, *[1000] * 7) for i in range(32)]
    assert load.first_of_new(loads(*drifting)) == 0


def test_a_record_of_another_model_is_refused() -> None:
    with pytest.raises(AssertionError):
        load.load_of(record(SKEWED), Topology(num_layers=3, num_experts=8, num_ranks=4, topk=2))


def test_times_that_are_missing_or_not_finite_or_a_compile_are_not_usable() -> None:
    ms = np.array([1.0, 1.1, 0.0, -1.0, np.nan, np.inf, 60.0, 0.9, 1.0])
    size = np.array([100, 110, 100, 100, 100, 100, 100, 90, 0])
    assert load.usable_times(ms, size).tolist() == [
        *(True, True, False, False, False, False, False, True, False)
    ]


def test_a_large_batch_and_a_small_one_are_no_outliers() -> None:
    ms = np.array([1.0, 1.0, 1.0, 20.0, 0.5])
    size = np.array([100, 100, 100, 2000, 1])
    assert load.usable_times(ms, size).all()
