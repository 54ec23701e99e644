"""Which resident replica is to move next: from the passes of a sliding window, one slot at a time.

Pure. A layer a prefill pass, in turn:

1. Every other pass of the window places: replicas as `place_resident` makes them for ranks (R&Q's
   slots, our aim), as if all slots were free.
2. The passes between them judge: how many rows fewer the busiest rank would have than with the
   replicas that are there. What is only noise of the first half does not show in the second.
3. Below `resident.min_gain` nothing moves, and a layer that has moved rests for a window.
4. Else the slots that differ move one after another. One that fails ends its layer's plan.

Rows of an expert are split evenly between its copies, or with `resident.split` quota by shares: the
replicas that are there by those in force or by better ones that can be planned for them, those to
come by what would be planned for them. So no layer moves for what new shares bring. Any expert may
gain a replica: that of a high original is quantised from it, that of a low one is a copy of its
bytes.

Shape letters: P passes of the window, L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from sglang_moelb.config import ResidentConfig
from sglang_moelb.controller.moves import (
    EMPTY,
    Held,
    Move,
    Moved,
    held_by,
    replicas_in,
    steps_between,
    with_slot,
)
from sglang_moelb.controller.place_resident import replicas_for
from sglang_moelb.controller.split import Shares, plan_shares, rank_rows
from sglang_moelb.placement import LayerPlacement, Replica, num_slots_of
from sglang_moelb.types import IntArray, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a layer's plan is to bring: rows of the busiest rank, of the passes that judged it."""

    layer: int
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Share of the busiest rank's rows that go."""
        return 1 - self.after / self.before


class Recalibration:
    """Follows the replicas that there are and says what is to move; not thread-safe."""

    def __init__(
        self, config: ResidentConfig, layers: tuple[LayerPlacement, ...], topology: Topology
    ) -> None:
        self._config = config
        self._topology = topology
        self._num_slots = num_slots_of(layers, topology.num_ranks)
        self._held: list[Held] = [held_by(one, topology, self._num_slots) for one in layers]
        self._window: deque[IntArray] = deque(maxlen=config.window_passes)
        self._rest = [0] * topology.num_layers  # passes until a layer is looked at again
        self._next_layer = 0
        self._plan: list[tuple[int, int, int]] = []
        self._change: Change | None = None
        self._move: Move | None = None
        self._is_pending = False
        self.layers = layers  # as they are now; another object after each change
        self.reason = "no passes yet"

    @property
    def word(self) -> int:
        """The newest move for the policy (`Move.word`); 0 before the first."""
        return self._move.word() if self._move else 0

    @property
    def moving(self) -> frozenset[int]:
        """The layer whose move is under way, if any."""
        return frozenset({self._move.layer} if self._move and self._is_pending else ())

    def rows(self) -> IntArray | None:
        """Rows of the whole window by layer and logical expert; None while it is not full."""
        if len(self._window) < self._config.window_passes:
            return None
        rows_LE: IntArray = np.sum(self._window, axis=0)
        return rows_LE

    def reconfigure(self, config: ResidentConfig) -> None:
        """Take other knobs; the newest passes are kept."""
        if config.window_passes != self._config.window_passes:
            self._window = deque(self._window, maxlen=config.window_passes)
        self._config = config

    def step(self, rows_LE: IntArray, moved: Moved | None, shares_L: Sequence[Shares] = ()) -> None:
        """Take in a prefill pass: its rows by logical expert, and how far the last move is.

        `shares_L` are those in force for `layers` as they are before; none where all are even.
        """
        self._window.append(rows_LE)
        self._rest = [max(rest - 1, 0) for rest in self._rest]
        if self._is_pending and moved and moved.word == self.word:
            self._settle(moved)
        if self._is_pending:
            return
        if not self._plan:
            self._look(shares_L)
        if self._plan:
            self._issue()

    def _settle(self, moved: Moved) -> None:
        assert self._move is not None
        move, self._is_pending = self._move, False
        layer = move.layer
        self._held[layer] = with_slot(self._held[layer], move.rank, move.slot, moved.held)
        replicas = replicas_in(self._held[layer])
        changed = msgspec.structs.replace(self.layers[layer], replicas=replicas)
        self.layers = (*self.layers[:layer], changed, *self.layers[layer + 1 :])
        self._rest[layer] = self._config.window_passes
        if moved.held != move.expert:
            self._plan = []
            self.reason = f"layer {layer}: the move of expert {move.expert} failed its value check"
        elif not self._plan:
            self.reason = f"layer {layer} has moved; {self.reason}"

    def _look(self, shares_L: Sequence[Shares]) -> None:
        """Judge the next layer, and plan its moves where they pay."""
        window_passes = self._config.window_passes
        if len(self._window) < window_passes:
            self.reason = f"{len(self._window)} of {window_passes} prefill passes seen"
            return
        if not self._config.move_ms:
            self.reason = "resident.move_ms is 0: nothing moves"
            return
        layer = self._next_layer
        self._next_layer = (layer + 1) % self._topology.num_layers
        if self._rest[layer]:
            self.reason = f"layer {layer} moved not long ago"
            return
        rows_PE = np.stack([rows_LE[layer] for rows_LE in self._window])
        places_E, judges_E = rows_PE[0::2].sum(axis=0), rows_PE[1::2].sum(axis=0)
        if not judges_E.any():
            self.reason = f"layer {layer} has no rows"
            return
        # A layer that has just moved rests, so these are shares of the replicas that it has.
        now = self._busiest(judges_E, self.layers[layer], shares_L[layer] if shares_L else {})
        mean = float(judges_E.sum()) / self._topology.num_ranks
        change = Change(layer=layer, before=now, after=mean)  # the most that any plan could bring
        wanted: list[Replica] = []
        if change.gain >= self._config.min_gain:
            wanted = replicas_for(places_E, self._topology, self._num_slots, "ranks")
            there, to_come = self.layers[layer], LayerPlacement(replicas=tuple(wanted))
            change = Change(
                layer=layer,
                before=min(now, self._split_anew(places_E, judges_E, there)),
                after=self._split_anew(places_E, judges_E, to_come),
            )
        if change.gain < self._config.min_gain:
            least = f"{self._config.min_gain:.1%}"
            self.reason = f"layer {layer}'s busiest rank would lose less than {least} of its rows"
            return
        self._plan = steps_between(self._held[layer], wanted)
        self._change = change

    def _split_anew(self, places_E: IntArray, judges_E: IntArray, layer: LayerPlacement) -> float:
        """Rows of the busiest rank of `judges_E` under the split that `places_E` would get."""
        by_quota = self._config.split == "quota"
        shares = plan_shares(places_E, layer, self._topology) if by_quota else {}
        return self._busiest(judges_E, layer, shares)

    def _busiest(self, rows_E: IntArray, layer: LayerPlacement, shares: Shares) -> float:
        return float(rank_rows(rows_E, layer, shares, self._topology).max())

    def _issue(self) -> None:
        """Make the next step of the plan the newest move."""
        change = self._change
        assert change is not None
        rank, slot, expert = self._plan.pop(0)
        number = self._move.number + 1 if self._move else 1
        layer = change.layer
        self._move = Move(number=number, layer=layer, rank=rank, slot=slot, expert=expert)
        self._is_pending = True
        old = self._held[layer][rank][slot]
        what = f"expert {expert}" if expert != EMPTY else "nothing"
        instead = f" instead of expert {old}" if old != EMPTY else ""
        self.reason = (
            f"layer {layer}: {what}{instead} in slot {slot} of rank {rank}; with this layer's "
            f"plan its busiest rank has {change.gain:.1%} fewer rows"
        )
