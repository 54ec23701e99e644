"""Laws of the interval: it holds what it should as often as it says, also for correlated samples.

Shape letters: N samples.
"""

from __future__ import annotations

import numpy as np
import pytest

from sglang_moelb.controller.batch_means import MIN_SAMPLES, share_of
from sglang_moelb.types import FloatArray

TRUE_SHARE, NUM_RUNS = 0.05, 400


def correlated(num: int, rho: float, rng: np.random.Generator) -> FloatArray:
    """A stationary sequence of mean 0, standard deviation 1 and correlation rho to the next."""
    step_N = rng.standard_normal(num)
    made_N = step_N.copy()
    for at in range(1, num):
        made_N[at] = rho * made_N[at - 1] + np.sqrt(1.0 - rho**2) * step_N[at]
    return made_N


def coverage(num: int, rho: float) -> float:
    """How often the interval has the share of samples that vary in gain and in size."""
    rng = np.random.default_rng(7)
    num_covered = 0
    for _ in range(NUM_RUNS):
        whole_N = 100.0 * np.exp(0.5 * rng.standard_normal(num))
        part_N = (TRUE_SHARE + 0.03 * correlated(num, rho, rng)) * whole_N
        share, half = share_of(part_N, whole_N)
        num_covered += abs(share - TRUE_SHARE) <= half
    return num_covered / NUM_RUNS


@pytest.mark.parametrize(
    ("num", "rho"), [(MIN_SAMPLES, 0.0), (60, 0.5), (200, 0.8), (400, 0.9), (1000, 0.95)]
)
def test_a_90_per_cent_interval_covers_in_at_least_85_per_cent_of_runs(
    num: int, rho: float
) -> None:
    assert coverage(num, rho) >= 0.85


def test_correlated_samples_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    halves = []
    for rho in (0.0, 0.9):
        runs = [share_of(correlated(400, rho, rng), np.ones(400))[1] for _ in range(50)]
        halves.append(np.mean(runs))
    assert halves[1] > 2.0 * halves[0]


def test_the_share_is_of_sums_not_a_mean_of_shares() -> None:
    part_N = np.array([1.0, 0.0] * MIN_SAMPLES)
    whole_N = np.array([9.0, 1.0] * MIN_SAMPLES)
    assert share_of(part_N, whole_N)[0] == pytest.approx(0.1)


def test_equal_samples_leave_no_doubt_and_none_is_lost_to_the_blocks() -> None:
    for num in range(MIN_SAMPLES, MIN_SAMPLES + 12):
        assert share_of(np.full(num, 0.25), np.ones(num)) == (0.25, 0.0)


def test_a_scale_cancels_out() -> None:
    rng = np.random.default_rng(1)
    part_N, whole_N = rng.random(100), 1.0 + rng.random(100)
    scaled = share_of(1000.0 * part_N, 1000.0 * whole_N)
    assert scaled == pytest.approx(share_of(part_N, whole_N))
