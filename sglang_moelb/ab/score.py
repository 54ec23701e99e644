"""Statistics of right and wrong answers. Pure functions on counts; nothing here is on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

CONFIDENCE = 0.95
POWER = 0.8
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)
_BISECTIONS = 60

Interval = tuple[float, float]


def wilson(num_correct: float, num_items: int) -> Interval:
    """The 95 % interval of a share (Wilson 1927), within 0 and 1; (0, 1) without items.

    An item that was tried several times may count in part.
    Example: 45 of 50 give 0.786 to 0.957.
    """
    if num_items == 0:
        return 0.0, 1.0
    share = num_correct / num_items
    centre = share + _Z**2 / (2 * num_items)
    half = _Z * math.sqrt(share * (1 - share) / num_items + (_Z / (2 * num_items)) ** 2)
    scale = 1 + _Z**2 / num_items
    low = 0.0 if num_correct == 0 else (centre - half) / scale
    high = 1.0 if num_correct == num_items else (centre + half) / scale
    return low, high


def mean_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, Interval]:
    """The mean of shares (correct, items) that count alike, and its 95 % interval.

    Distances from each share to its Wilson bounds, added in squares (MOVER, Zou and Donner 2008).
    Raises ValueError without shares or for one without items.
    """
    if not counts or any(num_items == 0 for _, num_items in counts):
        raise ValueError(f"counts={list(counts)!r}: every share needs items")
    shares = [num_correct / num_items for num_correct, num_items in counts]
    bounds = [wilson(num_correct, num_items) for num_correct, num_items in counts]
    mean = sum(shares) / len(shares)
    below = math.hypot(*(p - low for p, (low, _) in zip(shares, bounds, strict=True)))
    above = math.hypot(*(high - p for p, (_, high) in zip(shares, bounds, strict=True)))
    return mean, (mean - below / len(shares), mean + above / len(shares))


def mcnemar(num_lost: int, num_won: int) -> float:
    """The exact two-sided p-value that `num_lost` and `num_won` differ by chance.

    Both count items on which two servers differ in being right (McNemar 1947): a binomial test
    with chance 1/2. Example: 2 and 10 give 0.0386.
    """
    num = num_lost + num_won
    tail = sum(math.comb(num, i) for i in range(min(num_lost, num_won) + 1))
    return min(1.0, tail / 2 ** (num - 1)) if num else 1.0


def paired_difference(num_lost: float, num_won: float, num_items: int) -> tuple[float, Interval]:
    """Accuracy won less accuracy lost, and its 95 % interval (Agresti and Min 2005).

    The interval is that of one half more in each of the four cells, so it is never of width 0.
    An item that was tried several times may count in part; the interval is then a little wide.
    Raises ValueError without items.
    """
    if num_items == 0:
        raise ValueError("num_items=0: nothing to compare")
    lost, won, num = num_lost + 0.5, num_won + 0.5, num_items + 2
    centre = (won - lost) / num
    half = _Z * math.sqrt(lost + won - (won - lost) ** 2 / num) / num
    return (num_won - num_lost) / num_items, (max(-1.0, centre - half), min(1.0, centre + half))


def smallest_difference(num_items: int, discordance: float) -> float:
    """The smallest difference in accuracy that McNemar's test finds in 80 % of cases, at 5 %.

    `discordance` is the share of items on which the two servers differ in being right. It is at
    least the difference itself, and is taken as that where it is less. The normal approximation
    of Connor (1987): z_a sqrt(q) + z_b sqrt(q - d^2) = d sqrt(n), solved for d by bisection.
    Raises ValueError if `discordance` is no share; gives 1 where not even a difference of 1 is
    found. Example: 2,000 items, discordance 0.02, give 0.0088.
    """
    if not 0 <= discordance <= 1:
        raise ValueError(f"discordance={discordance}: a share from 0 to 1")

    def is_found(difference: float) -> bool:
        q = max(discordance, difference)
        needed = _Z * math.sqrt(q) + _Z_POWER * math.sqrt(q - difference**2)
        return needed <= difference * math.sqrt(num_items)

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def ratio_interval(sums: Sequence[float], nums: Sequence[int]) -> tuple[float, Interval]:
    """Sum over sums by sum over nums, and its 95 % interval with items as the unit of chance.

    For a mean over tokens that come in answers: tokens of one answer are alike. Linearised
    variance of a ratio (Cochran 1977, section 6.3). Raises ValueError without tokens.
    """
    num_tokens = sum(nums)
    if num_tokens == 0:
        raise ValueError("nums sum to 0: no tokens to average")
    mean = sum(sums) / num_tokens
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, nums, strict=True))
    half = _Z * math.sqrt(squares) / num_tokens
    return mean, (mean - half, mean + half)
