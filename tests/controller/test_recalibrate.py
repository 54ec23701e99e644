"""Laws of following the load with resident replicas: when a move pays, and which.

Shape letters: L MoE layers, E logical experts, R ranks, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.config import ResidentConfig
from sglang_moelb.controller import recalibrate
from sglang_moelb.controller.moves import (
    EMPTY,
    Move,
    Moved,
    held_by,
    move_of,
    replicas_in,
    steps_between,
    with_slot,
)
from sglang_moelb.controller.place_resident import replicas_for
from sglang_moelb.controller.recalibrate import Recalibration
from sglang_moelb.controller.resident_load import SplitRows
from sglang_moelb.controller.split import Splitting
from sglang_moelb.placement import LayerPlacement, Replica
from sglang_moelb.types import FloatArray, Topology

TOPOLOGY = Topology(num_layers=2, num_experts=32, num_ranks=4, topk=2)
CONFIG = ResidentConfig(recalibrate=True, window_passes=16, min_gain=0.05)
NUM_SLOTS, NUM_ROWS, PASSES_OF_A_MOVE = 2, 8000, 3


def popularity(hot: int) -> FloatArray:
    """Shares of experts: two of them on one rank take a quarter each."""
    share_E = np.full(TOPOLOGY.num_experts, 0.5 / (TOPOLOGY.num_experts - 2))
    share_E[[hot, hot + 1]] = 0.25
    return share_E


def start(hot: int) -> tuple[LayerPlacement, ...]:
    """Replicas for that load, in both layers."""
    rows_E = (popularity(hot) * NUM_ROWS).astype(np.int64)
    copies = tuple(replicas_for(rows_E, TOPOLOGY, NUM_SLOTS, "ranks"))
    return (LayerPlacement(replicas=copies),) * TOPOLOGY.num_layers


class Server:
    """Passes of a changing load, and moves that take some passes each."""

    def __init__(self, follows: Recalibration, seed: int = 0) -> None:
        self.follows = follows
        self.moved = Moved()
        self.moves: list[Move] = []
        self.balances: list[float] = []
        self._drawn = np.random.default_rng(seed)
        self._left = 0

    def run(
        self,
        num_passes: int,
        share_E: FloatArray,
        fails: Callable[[Move], bool] = lambda move: False,
    ) -> None:
        for _ in range(num_passes):
            rows_LE = self._drawn.multinomial(NUM_ROWS, share_E, size=TOPOLOGY.num_layers)
            self.follows.step(rows_LE, self.moved)
            rows_LR = SplitRows(self.follows.layers, TOPOLOGY)(rows_LE)
            self.balances.append(float((rows_LR.max(axis=1) / rows_LR.mean(axis=1)).mean()))
            self._advance(fails)

    def _advance(self, fails: Callable[[Move], bool]) -> None:
        move = move_of(self.follows.word)
        if move is None or move.word() == self.moved.word:
            return
        if not self.moves or self.moves[-1] != move:
            self.moves.append(move)
            self._left = PASSES_OF_A_MOVE
        self._left -= 1
        if not self._left:
            held = EMPTY if fails(move) else move.expert
            self.moved = Moved(word=move.word(), held=held)


def test_when_the_load_drifts_replicas_follow_and_the_ranks_are_balanced_again() -> None:
    server = Server(Recalibration(CONFIG, start(0), TOPOLOGY))
    server.run(40, popularity(0))
    assert server.moves == []
    steady = np.mean(server.balances)
    server.run(20, popularity(16))
    drifted = max(server.balances[-20:])
    assert drifted > 1.8 > 1.25 > steady
    server.run(120, popularity(16))
    assert np.mean(server.balances[-20:]) < 1.05 * steady
    assert server.follows.layers[0].replicas != start(0)[0].replicas
    assert "fewer rows" in server.follows.reason or "lose less than" in server.follows.reason


@pytest.mark.parametrize("seed", range(5))
def test_nothing_moves_on_steady_load(seed: int) -> None:
    server = Server(Recalibration(CONFIG, start(4), TOPOLOGY), seed)
    server.run(400, popularity(4))
    assert server.moves == []
    assert "5.0%" in server.follows.reason


def test_noise_of_a_balanced_load_moves_nothing() -> None:
    even_E = np.full(TOPOLOGY.num_experts, 1 / TOPOLOGY.num_experts)
    copies = tuple(Replica(expert=8 * rank, rank=(rank + 1) % 4) for rank in range(4))
    layers = (LayerPlacement(replicas=copies),) * 2
    server = Server(Recalibration(CONFIG, layers, TOPOLOGY))
    server.run(300, even_E)
    assert server.moves == []


def test_below_the_minimum_gain_nothing_moves_and_the_reason_names_it() -> None:
    config = ResidentConfig(recalibrate=True, window_passes=16, min_gain=0.9)
    server = Server(Recalibration(config, start(0), TOPOLOGY))
    server.run(100, popularity(16))
    assert server.moves == []
    assert "90.0%" in server.follows.reason


def test_with_a_limit_of_0_no_move_is_begun_until_it_is_lifted() -> None:
    stopped = ResidentConfig(recalibrate=True, window_passes=16, move_ms=0)
    follows = Recalibration(stopped, start(0), TOPOLOGY)
    server = Server(follows)
    server.run(100, popularity(16))
    assert (server.moves, follows.word) == ([], 0)
    assert "resident.move_ms is 0" in follows.reason
    follows.reconfigure(CONFIG)
    server.run(30, popularity(16))
    assert server.moves


def test_a_layer_whose_move_failed_rests_for_a_window_and_is_then_tried_again() -> None:
    server = Server(Recalibration(CONFIG, start(0), TOPOLOGY))
    server.run(20, popularity(0))
    server.run(20, popularity(16), fails=lambda move: move.layer == 0)
    in_first = [move for move in server.moves if move.layer == 0]
    assert len(in_first) == 1, "its plan ends"
    first = in_first[0]
    held = [r.expert for r in server.follows.layers[0].replicas if r.rank == first.rank]
    assert first.expert not in held, "the placement is told as it is"
    assert len(held) == NUM_SLOTS - 1
    server.run(100, popularity(16))
    assert len([move for move in server.moves if move.layer == 0]) > 1
    assert server.balances[-1] < 1.25


def test_one_move_is_under_way_at_a_time_and_each_has_its_own_number() -> None:
    server = Server(Recalibration(CONFIG, start(0), TOPOLOGY))
    server.run(150, popularity(16))
    assert len(server.moves) > 2
    assert [move.number for move in server.moves] == list(range(1, len(server.moves) + 1))


SMALL = Topology(num_layers=1, num_experts=8, num_ranks=2, topk=1)
EXCHANGED = (LayerPlacement(replicas=(Replica(expert=0, rank=1), Replica(expert=4, rank=0))),)
SHARED = (600, 700, 100, 50, 300, 100, 50, 25)  # expert 0's copies make both ranks equal by shares


def moves_of(
    rows: tuple[int, ...], split: Literal["even", "quota"]
) -> tuple[list[Move], float, Recalibration]:
    """Moves where each of 60 passes has `rows`, and max/mean of the last by the shares it has.

    All is done before the next pass.
    """
    config = ResidentConfig(recalibrate=True, window_passes=4, min_gain=0.05, split=split)
    follows, splitting = Recalibration(config, EXCHANGED, SMALL), Splitting(SMALL)
    rows_LE, moved, moves = np.array([rows]), Moved(), list[Move]()
    for _ in range(60):
        rows_now = follows.rows()
        if split == "quota" and rows_now is not None:
            splitting.step(rows_now, follows.layers, splitting.words, skip=follows.moving)
        follows.step(rows_LE, moved, splitting.shares_of(follows.layers))
        move = move_of(follows.word)
        if move and move.word() != moved.word:
            moves.append(move)
            moved = Moved(word=move.word(), held=move.expert)
    (rows_R,) = SplitRows(follows.layers, SMALL, splitting.shares_of(follows.layers))(rows_LE)
    return moves, float(rows_R.max() / rows_R.mean()), follows


def test_by_quota_a_layer_that_shares_balance_is_left_alone_and_moves_with_an_even_split() -> None:
    moves, balance, follows = moves_of(SHARED, "quota")
    assert (moves, follows.word) == ([], 0)
    assert balance < 1.01
    assert "less than 5.0%" in follows.reason
    moves, _, follows = moves_of(SHARED, "even")
    assert (moves[0].rank, moves[0].expert) == (0, EMPTY)
    assert follows.layers != EXCHANGED


def test_by_quota_a_layer_that_no_shares_can_balance_moves() -> None:
    # Rank 0 has 350 rows that no copy can take from it, more than half of all.
    rows = (10, 50, 150, 150, 10, 20, 20, 20)
    moves, balance, follows = moves_of(rows, "quota")
    assert moves
    assert follows.layers != EXCHANGED
    assert balance < 1.1
    (rows_R,) = SplitRows(EXCHANGED, SMALL, ({0: (1, 63), 4: (63, 1)},))(np.array([rows]))
    assert rows_R.max() / rows_R.mean() > 1.5


def test_shares_that_are_still_to_come_are_reckoned_with() -> None:
    config = ResidentConfig(recalibrate=True, window_passes=4, min_gain=0.05, split="quota")
    follows = Recalibration(config, EXCHANGED, SMALL)
    for _ in range(8):
        follows.step(np.array([SHARED]), Moved())
    assert follows.word == 0


def test_a_layer_that_the_shares_in_force_balance_is_not_planned_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(recalibrate, "replicas_for", fail)
    config = ResidentConfig(recalibrate=True, window_passes=2, min_gain=0.05, split="quota")
    follows = Recalibration(config, EXCHANGED, SMALL)
    for _ in range(6):
        follows.step(np.array([SHARED]), Moved(), ({0: (1, 63), 4: (42, 22)},))
    assert "less than 5.0%" in follows.reason
    with pytest.raises(AssertionError):
        follows.step(np.array([SHARED]), Moved(), ({},))


moves = st.builds(
    Move,
    number=st.integers(1, 2**24 - 1),
    layer=st.integers(0, 2**10 - 1),
    rank=st.integers(0, 2**10 - 1),
    slot=st.integers(0, 2**8 - 1),
    expert=st.integers(-1, 2**11 - 2),
)


@given(moves)
def test_a_move_travels_as_one_integer_of_int64(move: Move) -> None:
    assert 0 < move.word() < 2**63
    assert move_of(move.word()) == move


def test_no_move_is_the_integer_0_and_numbers_come_round_without_it() -> None:
    assert move_of(0) is None
    last = Move(number=2**24 - 1, layer=0, rank=0, slot=0, expert=EMPTY)
    after = Move(number=2**24, layer=0, rank=0, slot=0, expert=EMPTY)
    assert after.word() not in (0, last.word())
    assert Move(number=1, layer=0, rank=0, slot=0, expert=2).word() == 2**39 + 3


def test_the_example_of_steps_is_worked() -> None:
    wanted = [Replica(expert=e, rank=r) for e, r in ((3, 0), (5, 0), (1, 1))]
    assert steps_between(((3, -1), (0, 1)), wanted) == [(0, 1, 5), (1, 0, -1)]


copies = st.lists(
    st.builds(Replica, expert=st.integers(0, 7), rank=st.integers(0, 2)),
    max_size=12,
    unique_by=lambda one: (one.expert, one.rank),
).filter(lambda made: all(sum(one.rank == rank for one in made) <= 4 for rank in range(3)))


@given(copies, copies)
def test_steps_lead_from_any_placement_to_any_other_and_keep_what_stays(
    before: list[Replica], wanted: list[Replica]
) -> None:
    topology = Topology(num_layers=1, num_experts=12, num_ranks=3, topk=1)
    held = held_by(LayerPlacement(replicas=tuple(before)), topology, 4)
    steps = steps_between(held, wanted)
    for rank, slot, expert in steps:
        assert expert == EMPTY or expert not in held[rank]
        held = with_slot(held, rank, slot, expert)
    assert {(r.expert, r.rank) for r in replicas_in(held)} == {(r.expert, r.rank) for r in wanted}
    both = {(r.expert, r.rank) for r in before} & {(r.expert, r.rank) for r in wanted}
    fewest = max(len(before), len(wanted)) - len(both)
    assert len(steps) <= len(before) + len(wanted) - 2 * len(both)
    assert len(steps) >= fewest
