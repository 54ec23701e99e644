"""Every rule against plain loops on small cases, and the laws that each must keep."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moelb.replay import exact, lossy
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.history import Eplb, place, spread
from sglang_moelb.replay.replicas import replicate
from sglang_moelb.replay.types import Counts, Rule
from sglang_moelb.types import Level, Lever
from tests.replay import scalar
from tests.replay.world import counts, layer

LOADS = st.integers(1, 4).flatmap(
    lambda num_ranks: st.tuples(
        st.just(num_ranks),
        st.integers(1, 3).flatmap(
            lambda size: st.lists(
                st.lists(st.integers(0, 200), min_size=size * num_ranks, max_size=size * num_ranks),
                min_size=1,
                max_size=4,
            )
        ),
    )
)
EXACT: list[Rule] = [
    exact.none,
    exact.ideal,
    partial(exact.llep, min_rows=10),
    partial(exact.ultraep, min_rows=10),
    partial(replicate, min_rows=10, num_slots=2),
    Eplb(window=1, interval=1, num_redundant=2),
]


@pytest.mark.parametrize("rule", EXACT)
@given(LOADS)
@settings(max_examples=40)
def test_exact_rules_lose_and_add_no_row(
    rule: Rule, load: tuple[int, list[list[int]]]
) -> None:
    num_ranks, rows_LE = load
    fresh = Eplb(window=1, interval=1, num_redundant=2) if isinstance(rule, Eplb) else rule
    seen = counts([rows_LE, rows_LE], num_ranks=num_ranks)
    after_PLR = fresh(seen).rows_PLR
    assert (after_PLR.sum(axis=2) == seen.rows_PLR.sum(axis=2)).all()
    assert (after_PLR >= 0).all()


@pytest.mark.parametrize("rule", EXACT[:5])
@given(LOADS)
@settings(max_examples=40)
def test_per_pass_exact_rules_never_raise_the_peak(
    rule: Rule, load: tuple[int, list[list[int]]]
) -> None:
    num_ranks, rows_LE = load
    seen = counts([rows_LE], num_ranks=num_ranks)
    assert (rule(seen).rows_PLR.max(axis=2) <= seen.rows_PLR.max(axis=2)).all()


@given(LOADS, st.integers(1, 60))
def test_llep_is_its_pseudo_code(load: tuple[int, list[list[int]]], min_rows: int) -> None:
    num_ranks, rows_LE = load
    if num_ranks == 1:
        return
    after_LR = exact.llep(counts([rows_LE], num_ranks=num_ranks), min_rows=min_rows).rows_PLR[0]
    expected = [scalar.llep(rows, num_ranks, min_rows=min_rows) for rows in rows_LE]
    assert after_LR.tolist() == expected


@given(LOADS, st.integers(1, 60), st.integers(0, 3))
def test_ultraep_is_its_pseudo_code(
    load: tuple[int, list[list[int]]], min_rows: int, num_slots: int
) -> None:
    num_ranks, rows_LE = load
    seen = counts([rows_LE], num_ranks=num_ranks)
    after_LR = exact.ultraep(seen, min_rows=min_rows, num_slots=num_slots).rows_PLR[0]
    expected = [
        scalar.ultraep(rows, num_ranks, min_rows=min_rows, num_slots=num_slots) for rows in rows_LE
    ]
    assert after_LR.tolist() == expected


@given(LOADS, st.integers(0, 2))
def test_eplb_places_as_its_pseudo_code(
    load: tuple[int, list[list[int]]], per_rank: int
) -> None:
    num_ranks, rows_LE = load
    weight_LE = np.array(rows_LE, dtype=np.int64)
    placement = place(weight_LE, per_rank * num_ranks, num_ranks)
    expected = [scalar.eplb(rows, per_rank * num_ranks, num_ranks) for rows in rows_LE]
    found = placement.phy2log_LC.reshape(len(rows_LE), num_ranks, -1)
    assert found.tolist() == expected


def test_llep_balances_what_fits() -> None:
    after = exact.llep(layer([100, 20, 20, 20], num_ranks=4), min_rows=1).rows_PLR[0, 0]
    assert after.tolist() == [40, 40, 40, 40]


def test_llep_leaves_a_balanced_layer_alone() -> None:
    after = exact.llep(layer([45, 40, 40, 35], num_ranks=4), min_rows=1).rows_PLR[0, 0]
    assert after.tolist() == [45, 40, 40, 35]


def test_ultraep_without_slots_changes_nothing() -> None:
    after = exact.ultraep(layer([100, 20, 20, 20], num_ranks=4), min_rows=1, num_slots=0)
    assert after.rows_PLR[0, 0].tolist() == [100, 20, 20, 20]


def test_ultraep_with_slots_balances() -> None:
    after = exact.ultraep(layer([100, 20, 20, 20], num_ranks=4), min_rows=1, num_slots=2)
    assert after.rows_PLR[0, 0].tolist() == [40, 40, 40, 40]


def test_the_example_of_eplb_holds() -> None:
    placement = place(np.array([[9, 3, 3, 3]]), 0, 2)
    assert placement.phy2log_LC.tolist() == [[0, 3, 1, 2]]


def test_a_copied_expert_splits_its_rows_evenly() -> None:
    placement = place(np.array([[9, 3, 3]]), 1, 2)
    assert placement.num_copies_LE.tolist() == [[2, 1, 1]]
    after_PLR = spread(np.array([[[9, 3, 3]]]), placement, 2)
    assert sorted(after_PLR[0, 0].tolist()) == [7, 8]


def test_eplb_acts_a_window_late_and_only_then() -> None:
    hot_first = [[60, 40, 1, 1]]
    seen = counts([hot_first] * 5, num_ranks=2)
    after = Eplb(window=2, interval=2, num_redundant=0)(seen).rows_PLR[:, 0].max(axis=1)
    assert after.tolist() == [100, 100, 61, 61, 61]


def test_eplb_forgets_what_is_older_than_its_window() -> None:
    old, new = [[60, 40, 30, 1]], [[50, 1, 1, 48]]
    seen = counts([old, old, old, new, new, old], num_ranks=2)
    after = Eplb(window=1, interval=4, num_redundant=0)(seen).rows_PLR[:, 0].max(axis=1)
    assert after.tolist() == [100, 100, 100, 51, 51, 90]
    after = Eplb(window=4, interval=4, num_redundant=0)(seen).rows_PLR[:, 0].max(axis=1)
    assert after.tolist() == [100, 100, 100, 51, 98, 70]


def test_eplb_does_not_depend_on_how_passes_are_handed_over() -> None:
    rng = np.random.default_rng(0)
    rows_PLE = rng.integers(0, 100, (11, 2, 8))
    whole = Eplb(window=3, interval=2, num_redundant=2)(counts(rows_PLE, num_ranks=2)).rows_PLR
    rule = Eplb(window=3, interval=2, num_redundant=2)
    parts = [rule(counts(part, num_ranks=2)).rows_PLR for part in np.split(rows_PLE, [1, 4, 9])]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("level", list(Level))
def test_drop_keeps_every_group_within_its_capacity(level: Level) -> None:
    seen = layer([100, 20, 20, 20, 10, 10, 10, 10], num_ranks=4)
    outcome = lossy.capacity(seen, lever=Lever.DROP, factor=1.0, level=level)
    expected = {Level.DEVICE: [50, 40, 20, 20], Level.EXPERT: [45, 40, 20, 20]}[level]
    assert outcome.rows_PLR[0, 0].tolist() == expected
    assert outcome.lost_PL is not None
    assert outcome.lost_PL[0, 0] == 200 - sum(expected)


def test_expand_fills_to_capacity_and_loses_what_drop_loses() -> None:
    seen = layer([100, 20, 20, 20], num_ranks=4)
    outcome = lossy.capacity(seen, lever=Lever.EXPAND, factor=1.0)
    assert outcome.rows_PLR[0, 0].tolist() == [40, 40, 40, 40]
    assert outcome.lost_PL is not None
    assert outcome.lost_PL[0, 0] == 60


def test_protected_rows_are_not_dropped() -> None:
    seen = layer([100, 20, 20, 20], num_ranks=4, num_tokens=100, protected=60)
    outcome = lossy.capacity(seen, lever=Lever.DROP, factor=1.0)
    assert outcome.rows_PLR[0, 0].tolist() == [60, 20, 20, 20]


def test_a_capacity_of_each_source_is_enforced_there() -> None:
    rows_SE = np.array([[9, 1], [0, 10]])
    seen = Counts(
        rows_PLSEM=np.stack([rows_SE, np.zeros_like(rows_SE)], axis=-1)[None, None],
        rows_PLEM=np.array([[[[9, 0], [11, 0]]]]),
        num_tokens_PS=np.array([[5, 5]]),
        num_protected_P=np.zeros(1, dtype=np.int64),
        num_refused_P=np.zeros(1, dtype=np.int64),
        num_ranks=2,
        topk=2,
    )
    drop = lossy.capacity_aware(seen, factor=1.2)
    assert drop.rows_PLR[0, 0].tolist() == [6, 1 + 6]
    assert drop.lost_PL is not None
    assert drop.lost_PL[0, 0] == 3 + 4
    expanded = lossy.capacity_aware(seen, factor=1.2, expanded=True)
    assert expanded.rows_PLR[0, 0].tolist() == [5 + 0, 1 + 5]


@pytest.mark.parametrize("expanded", [False, True])
def test_capacity_aware_bounds_every_expert(expanded: bool) -> None:
    rng = np.random.default_rng(1)
    seen = counts(rng.integers(0, 50, (3, 2, 4)), num_ranks=4, num_sources=4, num_tokens=50)
    after = lossy.capacity_aware(seen, factor=1.0, expanded=expanded)
    assert after.rows_PLR.max() <= 4 * 25


def test_macs_reroutes_on_the_rank_before_it_drops() -> None:
    seen = layer([100, 0, 50, 50], num_ranks=2)
    outcome = lossy.macs(seen, factor=1.0)
    assert outcome.rows_PLR[0, 0].tolist() == [100, 100]
    crowded = lossy.macs(layer([90, 90, 10, 10], num_ranks=2), factor=1.0)
    assert crowded.rows_PLR[0, 0].max() < 180
    assert crowded.lost_PL is not None
    assert crowded.rows_PLR.sum() + crowded.lost_PL.sum() == 200


def test_macs_drops_fewer_rows_of_vision() -> None:
    lost = [
        lossy.macs(layer([100, 100, 10, 10], num_ranks=2, vision=v), factor=1.2, rho=0.0).lost_PL
        for v in (0.0, 0.8)
    ]
    assert lost[0] is not None
    assert lost[1] is not None
    assert lost[1].sum() < lost[0].sum()


def test_realb_downgrades_hot_ranks_of_vision_in_large_batches() -> None:
    hot_vision = layer([100, 10], num_ranks=2, vision=0.8)
    hot_text = layer([100, 10], num_ranks=2, vision=0.2)
    small = layer([100, 10], num_ranks=2, vision=0.8, num_tokens=100)
    low = [lossy.realb(seen).low_PLR for seen in (hot_vision, hot_text, small)]
    assert [one[0, 0].tolist() for one in low if one is not None] == [[1, 0], [0, 0], [0, 0]]


def test_replicas_reach_what_the_planner_plans_for_every_layer_of_every_pass() -> None:
    seen = counts([[[90, 10, 0, 0], [25, 25, 25, 25]], [[0, 0, 1, 99], [0, 0, 0, 0]]], num_ranks=2)
    after_PLR = replicate(seen, min_rows=1, num_slots=1).rows_PLR
    assert after_PLR.tolist() == [[[50, 50], [50, 50]], [[50, 50], [0, 0]]]
    assert (replicate(seen, min_rows=1, num_slots=0).rows_PLR == seen.rows_PLR).all()
    assert (replicate(seen, min_rows=60, num_slots=1).rows_PLR.max(axis=2) <= 100).all()


def test_our_replicas_pay_the_time_measured_and_those_of_peers_are_free() -> None:
    seen = counts([[[90, 10, 0, 0], [25, 25, 25, 25]]] * 3, num_ranks=2)
    ours = replicate(seen, min_rows=1, num_slots=1)
    machine = Machine(own_ms=(0.0, 0.0, 0.0, 0.0, 0.5))
    assert machine.own_step_ms(ours).tolist() == [1.0, 1.0, 1.0]
    theirs = exact.ultraep(seen, min_rows=1, num_slots=1)
    assert machine.own_step_ms(theirs).tolist() == [0.0, 0.0, 0.0]
