"""Laws of the lever `drop` on real ranks: what is kept, what is dropped, what is never touched."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.types import Level, Lever, Metric, Policy, Preference, Scope

from .layers import (
    NUM_EXPERTS,
    ROUTINGS,
    TOPK,
    Row,
    balance,
    capacity_of,
    num_groups_of,
    num_tokens_of,
    reflagged,
    routing,
    rows_of,
)
from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

LEVELS = tuple(Level)
PLAIN = Policy(
    epoch=1, lever=Lever.DROP, capacity_factor=0.8, preference=Preference.IMAGE_FIRST
)


def by_group(rows: list[Row], num_groups: int) -> list[list[Row]]:
    size = NUM_EXPERTS // num_groups
    return [[r for r in rows if r.expert // size == g] for g in range(num_groups)]


def num_kept(rows: list[Row]) -> int:
    return sum(r.kept for r in rows)


def must_keep(rows: list[Row], capacity: int) -> int:
    """Protected rows, and as many of the others as find room beside them."""
    num_protected = sum(r.protected for r in rows)
    return num_protected + min(len(rows) - num_protected, max(capacity - num_protected, 0))


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_global_drop_keeps_what_fits_and_not_one_row_less_or_more(
    ranks: Ranks, name: str, level: Level, num_ranks: int
) -> None:
    policy = replace(PLAIN, level=level)
    inputs = routing(name, num_ranks)
    outcomes = balance(ranks, inputs, policy, Lever.DROP)
    num_groups = num_groups_of(policy, num_ranks)
    capacity = capacity_of(policy, sum(map(num_tokens_of, inputs)), num_groups)
    for rows in by_group(rows_of(inputs, outcomes), num_groups):
        assert num_kept(rows) == must_keep(rows, capacity)
        if not any(r.protected for r in rows):
            assert num_kept(rows) == min(len(rows), capacity)


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_drop_per_source_keeps_what_fits_in_each_ranks_own_capacity(
    ranks: Ranks, name: str, level: Level, num_ranks: int
) -> None:
    policy = replace(PLAIN, level=level, scope=Scope.SOURCE)
    inputs = routing(name, num_ranks)
    rows = rows_of(inputs, balance(ranks, inputs, policy, Lever.DROP))
    num_groups = num_groups_of(policy, num_ranks)
    for rank, one in enumerate(inputs):
        capacity = capacity_of(policy, num_tokens_of(one), num_groups)
        for group in by_group([r for r in rows if r.rank == rank], num_groups):
            assert num_kept(group) == must_keep(group, capacity)


@pytest.mark.parametrize("level", LEVELS)
def test_without_protection_every_capacity_of_every_factor_is_held(
    ranks: Ranks, level: Level
) -> None:
    inputs = routing("no-protected", 4)
    num_groups = num_groups_of(replace(PLAIN, level=level), 4)
    for factor in (0.001, 0.3, 1.0, 4 / 3, 1.7, 100.0):
        policy = replace(PLAIN, level=level, capacity_factor=factor)
        capacity = capacity_of(policy, sum(map(num_tokens_of, inputs)), num_groups)
        rows = by_group(
            rows_of(inputs, balance(ranks, inputs, policy, Lever.DROP)), num_groups
        )
        assert [num_kept(g) for g in rows] == [min(len(g), capacity) for g in rows]


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("lever", [Lever.DROP, Lever.EXPAND])
@pytest.mark.parametrize("renormalise", [False, True])
def test_protected_tokens_and_padding_come_back_to_the_bit(
    ranks: Ranks, name: str, lever: Lever, renormalise: bool
) -> None:
    policy = replace(PLAIN, lever=lever, capacity_factor=0.05, renormalise=renormalise)
    inputs = routing(name, 4)
    num_changed = 0
    for one, out in zip(inputs, balance(ranks, inputs, policy, lever), strict=True):
        still_T = ((one.flags_T & FLAG_PROTECTED) != 0) | (one.ids_TK < 0).all(dim=1)
        assert torch.equal(out.ids_TC[still_T, :TOPK], one.ids_TK[still_T])
        assert torch.equal(out.weights_TC[still_T, :TOPK], one.weights_TK[still_T])
        assert (out.ids_TC[still_T, TOPK:] == -1).all()
        missing_TK = one.ids_TK < 0
        assert (out.ids_TC[:, :TOPK][missing_TK] == -1).all(), "-1 stays -1"
        num_changed += int((out.ids_TC[~still_T, :TOPK] != one.ids_TK[~still_T]).sum())
    assert (num_changed == 0) == (name == "all-protected")


@pytest.mark.parametrize("name", ["random", "skewed", "padded"])
def test_kept_rows_are_as_they_were_and_dropped_rows_weigh_nothing(
    ranks: Ranks, name: str
) -> None:
    inputs = routing(name, 4)
    for one, out in zip(inputs, balance(ranks, inputs, PLAIN, Lever.DROP), strict=True):
        kept_TK = out.ids_TC >= 0
        assert out.ids_TC.shape == one.ids_TK.shape
        assert torch.equal(out.ids_TC[kept_TK], one.ids_TK[kept_TK])
        assert torch.equal(out.weights_TC[kept_TK], one.weights_TK[kept_TK])
        assert (out.weights_TC[~kept_TK] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preference", [Preference.IMAGE_FIRST, Preference.TEXT_FIRST])
def test_the_other_modality_is_dropped_only_where_none_of_the_first_is_left(
    ranks: Ranks, preference: Preference, level: Level
) -> None:
    """Within a group: if a row of the spared modality goes, no row of the other one stays, but for
    protected rows."""
    first_is_vision = preference is Preference.IMAGE_FIRST
    seen: set[bool] = set()
    for factor in (0.3, 0.8):
        policy = replace(PLAIN, preference=preference, level=level, capacity_factor=factor)
        inputs = routing("skewed", 4)
        rows = rows_of(inputs, balance(ranks, inputs, policy, Lever.DROP))
        for group in by_group(rows, num_groups_of(policy, 4)):
            free = [r for r in group if not r.protected]
            spared_gone = any(not r.kept for r in free if r.vision != first_is_vision)
            first_stays = any(r.kept for r in free if r.vision == first_is_vision)
            assert not (spared_gone and first_stays)
            seen.add(spared_gone)
    assert seen == {False, True}, "the cases must cut on both sides of the preference"


def test_uniform_preference_ignores_the_modality(ranks: Ranks) -> None:
    policy = replace(PLAIN, preference=Preference.UNIFORM)
    inputs = routing("skewed", 4)
    swapped = [reflagged(one, one.flags_T ^ FLAG_VISION) for one in inputs]
    plain, other = (balance(ranks, case, policy, Lever.DROP) for case in (inputs, swapped))
    assert all(torch.equal(a.ids_TC, b.ids_TC) for a, b in zip(plain, other, strict=True))
    first = replace(policy, preference=Preference.IMAGE_FIRST)
    plain, other = (balance(ranks, case, first, Lever.DROP) for case in (inputs, swapped))
    assert not all(torch.equal(a.ids_TC, b.ids_TC) for a, b in zip(plain, other, strict=True))


def test_random_ranking_differs_by_layer_and_from_score(ranks: Ranks) -> None:
    inputs = routing("no-protected", 2)
    kept = {
        metric: [
            out.ids_TC.tolist()
            for out in balance(ranks, inputs, replace(PLAIN, metric=metric), Lever.DROP)
        ]
        for metric in Metric
    }
    assert len({str(ids) for ids in kept.values()}) == len(Metric)


@pytest.mark.parametrize("metric", [Metric.ORDER, Metric.REVERSE])
def test_order_keeps_the_first_and_reverse_the_last_tokens_of_each_rank(
    ranks: Ranks, metric: Metric
) -> None:
    policy = replace(PLAIN, metric=metric, preference=Preference.UNIFORM, level=Level.EXPERT)
    inputs = routing("skewed", 2)
    rows = rows_of(inputs, balance(ranks, inputs, policy, Lever.DROP))
    num_cut = 0
    for group in by_group(rows, NUM_EXPERTS):
        for rank in range(2):
            mine = [r for r in group if r.rank == rank and not r.protected]
            kept = [r.token for r in mine if r.kept]
            gone = [r.token for r in mine if not r.kept]
            num_cut += bool(kept and gone)
            if kept and gone:
                assert max(kept) < min(gone) if metric is Metric.ORDER else min(kept) > max(gone)
    assert num_cut


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_renormalising_keeps_each_tokens_sum_unless_all_its_rows_went(
    ranks: Ranks, scale: float
) -> None:
    policy = replace(PLAIN, capacity_factor=0.4, renormalise=True)
    num_empty = num_scaled = 0
    inputs = routing("skewed", 4)
    for one in inputs:
        one.weights_TK.mul_(scale)
    for one, out in zip(inputs, balance(ranks, inputs, policy, Lever.DROP), strict=True):
        empty_T = (out.ids_TC < 0).all(dim=1)
        before_T, after_T = one.weights_TK.sum(dim=1), out.weights_TC.sum(dim=1)
        assert (after_T[empty_T] == 0).all()
        assert torch.allclose(after_T[~empty_T], before_T[~empty_T], rtol=1e-5)
        num_empty += int(empty_T.sum())
        num_scaled += int(((out.ids_TC < 0).any(dim=1) & ~empty_T).sum())
    assert num_empty
    assert num_scaled


def oracle_key(row: Row) -> int:
    """Key of score under image-first from its definition: a text bit above four bits of exponent
    and eleven of mantissa, of weights from 2**-12 to 2**4."""
    weight = Fraction(row.weight)
    exponent = 0
    while exponent < 15 and Fraction(2) ** (exponent - 11) <= weight:
        exponent += 1
    mantissa = int(weight / Fraction(2) ** (exponent - 12) * 2048) - 2048
    return ((not row.vision) << 15) + exponent * 2048 + mantissa


def oracle_kept(rows: list[Row], capacity: int, num_ranks: int) -> set[Row]:
    """The documented rule in plain integers: whole bins from the top, the boundary bin dealt to the
    ranks by what they hold there, and in each rank by key and then by place."""
    kept = {r for r in rows if r.protected}
    room = max(capacity - len(kept), 0)
    free = [r for r in rows if not r.protected]
    for cut_bin in range(63, -1, -1):
        inside = [r for r in free if oracle_key(r) >> 10 == cut_bin]
        if len(inside) <= room:
            kept |= set(inside)
            room -= len(inside)
            continue
        until = 0
        for rank in range(num_ranks):
            mine = [r for r in inside if r.rank == rank]
            mine.sort(key=lambda r: (-oracle_key(r), r.token, r.column))
            before, until = until, until + len(mine)
            quota = room * until // len(inside) - room * before // len(inside)
            kept |= set(mine[:quota])
        break
    return kept


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["random", "skewed", "ties", "idle-rank", "last-expert"])
def test_score_drop_equals_an_independent_oracle_row_by_row(
    ranks: Ranks, name: str, level: Level, num_ranks: int
) -> None:
    factor = 0.3 if name == "last-expert" else 0.8  # there a token has one row, not top-k
    policy = replace(PLAIN, level=level, capacity_factor=factor)
    inputs = routing(name, num_ranks, seed=5)
    rows = rows_of(inputs, balance(ranks, inputs, policy, Lever.DROP))
    num_groups = num_groups_of(policy, num_ranks)
    capacity = capacity_of(policy, sum(map(num_tokens_of, inputs)), num_groups)
    expected: set[Row] = set()
    for group in by_group(rows, num_groups):
        expected |= oracle_kept(group, capacity, num_ranks)
    assert {r for r in rows if r.kept} == expected
    assert len(expected) < len(rows)
