"""Intervals and tests against published values, exact enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sglang_moelb.ab.score import (
    mcnemar,
    mean_interval,
    paired_difference,
    ratio_interval,
    smallest_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("num_correct", "num_items", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, score method without correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_bounds(
    num_correct: int, num_items: int, low: float, high: float
) -> None:
    assert wilson(num_correct, num_items) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("num_correct", [0, 7, 49, 50])
def test_wilson_agrees_with_scipy_and_mirrors(num_correct: int) -> None:
    theirs = stats.binomtest(num_correct, 50).proportion_ci(method="wilson")
    low, high = wilson(num_correct, 50)
    assert (low, high) == pytest.approx((theirs.low, theirs.high))
    assert wilson(50 - num_correct, 50) == pytest.approx((1 - high, 1 - low))


def test_wilson_without_items_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("num_lost", "num_won"), [(2, 10), (10, 2), (0, 6), (5, 5), (30, 61)])
def test_mcnemar_is_the_exact_binomial_test(num_lost: int, num_won: int) -> None:
    theirs = stats.binomtest(num_lost, num_lost + num_won, 0.5).pvalue
    assert mcnemar(num_lost, num_won) == pytest.approx(theirs)


def test_mcnemar_gives_the_published_value_and_one_without_disagreement() -> None:
    assert mcnemar(2, 10) == pytest.approx(0.03857421875)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(4, 4) == 1.0


def test_mean_of_one_share_has_its_wilson_interval_and_more_shares_narrow_it() -> None:
    mean, interval = mean_interval([(45, 50)])
    assert mean == 0.9
    assert interval == pytest.approx(wilson(45, 50))
    mean, (low, high) = mean_interval([(45, 50)] * 4)
    assert mean == pytest.approx(0.9)
    assert high - low == pytest.approx((interval[1] - interval[0]) / 2)
    with pytest.raises(ValueError, match="every share needs items"):
        mean_interval([(1, 2), (0, 0)])


def test_paired_difference_is_signed_and_its_interval_never_empty() -> None:
    value, (low, high) = paired_difference(30, 10, 1000)
    assert value == -0.02
    assert low < value < high < 0
    value, (low, high) = paired_difference(0, 0, 1000)
    assert value == 0
    assert low == pytest.approx(-high)
    assert 0.001 < high < 0.004
    assert paired_difference(10, 30, 1000)[0] == 0.02


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    lost, won, num = 0.03, 0.01, 500
    draws = rng.multinomial(num, [lost, won, 1 - lost - won], size=2000)
    covered = [
        low <= won - lost <= high
        for low, high in (paired_difference(int(b), int(c), num)[1] for b, c, _ in draws)
    ]
    assert 0.93 <= np.mean(covered) <= 0.975


@pytest.mark.parametrize("discordance", [0.02, 0.05, 0.1])
def test_the_smallest_difference_is_found_in_four_of_five_cases(discordance: float) -> None:
    num = 2000
    difference = smallest_difference(num, discordance)
    assert difference < discordance
    rng = np.random.default_rng(1)
    lost, won = (discordance + difference) / 2, (discordance - difference) / 2
    draws = rng.multinomial(num, [lost, won, 1 - lost - won], size=1500)
    power = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert 0.74 <= power <= 0.84  # the exact test is a little less eager than the formula


def test_the_smallest_difference_follows_connors_formula() -> None:
    d, q, n = smallest_difference(2000, 0.05), 0.05, 2000
    z_a, z_b = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    assert n == pytest.approx(((z_a * math.sqrt(q) + z_b * math.sqrt(q - d * d)) / d) ** 2)


def test_the_smallest_difference_grows_with_disagreement_and_shrinks_with_items() -> None:
    assert smallest_difference(2000, 0.0) < smallest_difference(2000, 0.02)
    assert smallest_difference(8000, 0.02) < smallest_difference(2000, 0.02)
    assert 0.003 < smallest_difference(2000, 0.0) < 0.005  # every discordant item a loss
    assert smallest_difference(2, 1.0) == 1.0
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        smallest_difference(2000, 1.2)


def test_ratio_interval_takes_items_as_the_unit_of_chance() -> None:
    value, (low, high) = ratio_interval([2.0, 4.0, 6.0], [1, 2, 3])
    assert value == low == high == 2.0
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(400):
        level = rng.exponential(1.0, size=200)  # shared by the tokens of an item
        nums = rng.integers(1, 6, size=200)
        value, (low, high) = ratio_interval((level * nums).tolist(), nums.tolist())
        covered.append(low <= 1.0 <= high)
    assert 0.91 <= np.mean(covered) <= 0.98
    with pytest.raises(ValueError, match="no tokens"):
        ratio_interval([0.0], [0])
