"""Laws of the shares of resident copies: never worse than even, exact, and steady.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moelb.controller.place_resident import replicas_for
from sglang_moelb.controller.resident_load import SplitRows
from sglang_moelb.controller.split import (
    MOST_SHARED,
    NUM_WORDS,
    UNITS,
    Split,
    Splitting,
    bounds_of,
    plan_shares,
    rank_rows,
    ranks_of,
    split_of,
)
from sglang_moelb.kernels.choose_copy import ref
from sglang_moelb.placement import LayerPlacement, Replica
from sglang_moelb.types import FloatArray, Topology

TOPOLOGY = Topology(num_layers=2, num_experts=32, num_ranks=4, topk=2)
NUM_SLOTS, NUM_ROWS, NUM_PASSES = 2, 8000, 16

rows_of_experts = st.lists(st.integers(0, 10**6), min_size=32, max_size=32).map(np.array)
replicas = st.lists(
    st.builds(Replica, expert=st.integers(0, 31), rank=st.integers(0, 3)),
    max_size=16,
    unique_by=lambda one: (one.expert, one.rank),
).map(lambda made: tuple(one for one in made if one.expert // 8 != one.rank))


@settings(deadline=None)
@given(rows_of_experts, replicas)
def test_a_plan_is_never_worse_than_an_even_split_and_its_shares_add_up(
    rows_E: np.ndarray, copies: tuple[Replica, ...]
) -> None:
    layer = LayerPlacement(replicas=copies)
    shares = plan_shares(rows_E, layer, TOPOLOGY)
    ranks = ranks_of(layer, TOPOLOGY)
    for expert, own in shares.items():
        assert (sum(own), len(own)) == (UNITS, len(ranks[expert]))
        assert min(own) >= 1
    planned_R, even_R = (rank_rows(rows_E, layer, one, TOPOLOGY) for one in (shares, {}))
    assert planned_R.max() <= even_R.max()
    assert planned_R.sum() == pytest.approx(rows_E.sum())


def test_two_ranks_whose_best_split_is_known_get_it() -> None:
    topology = Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1)
    layer = LayerPlacement(replicas=(Replica(expert=0, rank=1),))
    # 640 rows to deal beside 160 and 480: 480 of them, 48 units, make both 640.
    shares = plan_shares(np.array([640, 160, 480, 0]), layer, topology)
    assert shares == {0: (48, 16)}


def test_all_rows_on_one_expert_are_dealt_to_all_its_copies() -> None:
    layer = LayerPlacement(replicas=tuple(Replica(expert=0, rank=rank) for rank in (1, 2)))
    rows_E = np.zeros(32, dtype=np.int64)
    rows_E[0] = 10_000
    shares = plan_shares(rows_E, layer, TOPOLOGY)
    assert max(shares.get(0, (22, 21, 21))) <= 22


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_one_row_or_no_copies_are_split_evenly(rows: int) -> None:
    rows_E = np.zeros(32, dtype=np.int64)
    rows_E[3] = rows
    assert plan_shares(rows_E, LayerPlacement(), TOPOLOGY) == {}
    layer = LayerPlacement(replicas=(Replica(expert=3, rank=2),))
    assert plan_shares(rows_E, layer, TOPOLOGY) == {}


@given(
    st.integers(0, 1023),
    st.integers(0, 2047),
    st.integers(0, MOST_SHARED),
    st.integers(1, 3),
    st.randoms(),
)
def test_shares_travel_as_one_integer_of_int64(
    layer: int, expert: int, num_shares: int, turn: int, drawn: np.random.Generator
) -> None:
    ends = sorted(drawn.sample(range(1, UNITS), max(num_shares - 1, 0)))  # type: ignore[attr-defined]
    edges = [0, *ends, UNITS]
    shares = tuple(b - a for a, b in pairwise(edges)) if num_shares > 1 else ()
    split = Split(layer=layer, expert=expert, shares=shares, turn=turn)
    assert 0 < split.word() < 2**63
    assert split_of(split.word()) == split


def test_no_shares_are_the_integer_0_and_the_units_are_those_of_the_kernel() -> None:
    assert split_of(0) is None
    assert ref.UNITS == UNITS
    assert bounds_of((16, 8, 40)) == [16, 24, 64, 64, 64, 64]
    assert bounds_of(()) == [0] * 6


AT_START = (0.3, 0.15, 0.1)


def popularity(weights: tuple[float, float, float] = AT_START) -> FloatArray:
    """Shares of experts: two of rank 0 and one of rank 1 are hot."""
    share_E = np.full(32, (1 - sum(weights)) / 29)
    share_E[[0, 1, 9]] = weights
    return share_E


def start() -> tuple[LayerPlacement, ...]:
    rows_E = (popularity() * NUM_ROWS).astype(np.int64)
    copies = tuple(replicas_for(rows_E, TOPOLOGY, NUM_SLOTS, "experts"))
    return (LayerPlacement(replicas=copies),) * 2


class Server:
    """Passes of a load; all ranks take the shares a pass later."""

    def __init__(self, layers: tuple[LayerPlacement, ...], seed: int = 0) -> None:
        self.layers, self.splitting = layers, Splitting(TOPOLOGY)
        self.window: list[np.ndarray] = []
        self.balances: list[tuple[float, float]] = []  # even, and as shared
        self.num_issues = 0
        self._drawn = np.random.default_rng(seed)
        self._applied: tuple[int, ...] = ()

    def run(self, num_passes: int, share_E: FloatArray) -> None:
        for _ in range(num_passes):
            rows_LE = self._drawn.multinomial(NUM_ROWS, share_E, size=2)
            self.window = [*self.window[1 - NUM_PASSES :], rows_LE]
            shares_L = self.splitting.shares_of(self.layers)
            both = [SplitRows(self.layers, TOPOLOGY, one)(rows_LE) for one in ((), shares_L)]
            assert all((rows_LR.sum(axis=1) == NUM_ROWS).all() for rows_LR in both)
            even, shared = (float((r.max(axis=1) / r.mean(axis=1)).mean()) for r in both)
            self.balances.append((even, shared))
            said, applied = self.splitting.words, self._applied
            self.splitting.step(np.sum(self.window, axis=0), self.layers, applied)
            self.num_issues += self.splitting.words != said
            self._applied = said


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("weights", "least_even"),
    [
        (AT_START, 1.04),
        ((0.15, 0.3, 0.1), 1.09),
        ((0.1, 0.15, 0.3), 1.1),
        ((0.1, 0.4, 0.1), 1.13),
        ((0.4, 0.1, 0.05), 1.028),
        ((0.2, 0.1, 0.25), 1.07),
    ],
)
def test_where_the_load_leaves_the_placement_shares_balance_the_ranks_and_then_stay(
    seed: int, weights: tuple[float, float, float], least_even: float
) -> None:
    server = Server(start(), seed)
    server.run(20, popularity())
    assert server.num_issues
    server.run(NUM_PASSES + 4, popularity(weights))
    settled = server.num_issues
    server.run(200, popularity(weights))
    assert server.num_issues - settled <= 2, "shares do not flap on steady load"
    even, shared = np.mean(server.balances[-100:], axis=0)
    assert shared < 1.022, "what 8,000 rows drawn at random leave"
    assert even > least_even


def test_the_next_shares_wait_until_all_ranks_have_taken_the_last() -> None:
    splitting, layers = Splitting(TOPOLOGY), start()
    rows_LE = np.stack([popularity() * 1e5] * 2).astype(np.int64)
    splitting.step(rows_LE, layers, ())
    words = splitting.words
    assert 0 < len(words) <= NUM_WORDS
    turned_LE = rows_LE[:, ::-1].copy()
    splitting.step(turned_LE, layers, ())
    assert splitting.words == words
    splitting.step(turned_LE, layers, words)
    assert splitting.words != words


def test_an_expert_whose_copies_change_is_split_evenly_and_a_moving_layer_gets_no_shares() -> None:
    splitting, layers = Splitting(TOPOLOGY), start()
    rows_LE = np.stack([popularity() * 1e5] * 2).astype(np.int64)
    splitting.step(rows_LE, layers, (), skip=frozenset({1}))
    first, second = splitting.shares_of(layers)
    assert first
    assert not second
    assert splitting.shares_of((LayerPlacement(),) * 2) == ({}, {})


def test_going_back_to_even_takes_all_shares_away_with_one_word_and_waits_for_none() -> None:
    splitting, layers = Splitting(TOPOLOGY), start()
    splitting.end()
    assert splitting.words == (), "there was nothing to end"
    rows_LE = np.stack([popularity() * 1e5] * 2).astype(np.int64)
    splitting.step(rows_LE, layers, ())
    assert any(splitting.shares_of(layers))
    splitting.end()
    assert not any(splitting.shares_of(layers))
    (word,) = splitting.words
    split = split_of(word)
    assert split is not None
    assert split.is_of_all
    splitting.end()
    assert splitting.words == (word,)
    splitting.step(rows_LE, layers, splitting.words)
    assert any(splitting.shares_of(layers)), "shares can begin again"
