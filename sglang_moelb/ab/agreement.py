"""Greedy agreement and log-probability distance of two lists of outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_moelb.ab.measure import KINDS, of_kind
from sglang_moelb.ab.result import Agreement, Distance
from sglang_moelb.ab.types import Outcome


@dataclass(frozen=True, slots=True)
class Pair:
    """One request in both arms: lengths in tokens, and |difference| where both are known."""

    num_common: int
    num_longest: int
    is_equal: bool
    differences: tuple[float, ...]


def compare(base: Outcome, other: Outcome) -> Pair:
    """Tokens and log-probabilities of `other` against `base`, up to their first difference.

    Example: base tokens 5 6 7 with log-probabilities -1 -2 -3, other 5 6 8 with -1 -2.5 -1, give
    2 common of 3 tokens, not equal, differences 0 and 0.5.
    """
    both_ids = bool(base.token_ids and other.token_ids)
    left = base.token_ids if both_ids else base.token_texts
    right = other.token_ids if both_ids else other.token_texts
    num_common = 0
    for one, two in zip(left, right, strict=False):
        if one != two:
            break
        num_common += 1
    known = zip(base.logprobs[:num_common], other.logprobs[:num_common], strict=False)
    return Pair(
        num_common=num_common,
        num_longest=max(len(left), len(right)),
        is_equal=num_common == len(left) == len(right),
        differences=tuple(abs(a - b) for a, b in known if a is not None and b is not None),
    )


def agreement(base: Iterable[Outcome], other: Iterable[Outcome]) -> list[Agreement]:
    """Rows for all, image and text requests that succeeded in the same round of both arms."""
    theirs = {(o.round, o.request_id): o for o in other if not o.error}
    mine = [o for o in base if not o.error and (o.round, o.request_id) in theirs]
    rows = []
    for kind in KINDS:
        pairs = [compare(o, theirs[o.round, o.request_id]) for o in of_kind(mine, kind)]
        if pairs:
            rows.append(_summarise(kind, pairs))
    return rows


def repeatability(outcomes: Sequence[Outcome]) -> list[Agreement]:
    """An arm's later rounds against its own first: what differs although nothing was changed."""
    first = {o.request_id: o for o in outcomes if o.round == 0 and not o.error}
    later = [o for o in outcomes if o.round > 0 and not o.error and o.request_id in first]
    rows = []
    for kind in KINDS:
        pairs = [compare(first[o.request_id], o) for o in of_kind(later, kind)]
        if pairs:
            rows.append(_summarise(kind, pairs))
    return rows


def _summarise(kind: str, pairs: Sequence[Pair]) -> Agreement:
    num_common = sum(pair.num_common for pair in pairs)
    num_longest = sum(pair.num_longest for pair in pairs)
    num_equal = sum(pair.is_equal for pair in pairs)
    num_known = sum(len(pair.differences) for pair in pairs)
    return Agreement(
        kind=kind,
        num_pairs=len(pairs),
        num_equal=num_equal,
        equal_share=num_equal / len(pairs),
        token_share=num_common / num_longest if num_longest else 1.0,
        distance_all=_distance(pairs),
        distance_equal=_distance([pair for pair in pairs if pair.is_equal]),
        logprob_coverage=num_known / num_common if num_common else 0.0,
    )


def _distance(pairs: Sequence[Pair]) -> Distance | None:
    values = np.array([value for pair in pairs for value in pair.differences])
    if not values.size:
        return None
    return Distance(num_tokens=values.size, mean=float(values.mean()), max=float(values.max()))
