"""Moves of resident replicas: one slot gets another expert; and what is told of them.

A slot is a place for a replica; every rank has equally many in every layer. All ranks start the
same move in the same pass: it travels as one integer of the policy.

Shape letters: L MoE layers, R ranks, S slots of a rank and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_moelb.placement import LayerPlacement, Replica
from sglang_moelb.types import Topology

EMPTY = -1  # what a slot without a replica holds
WIDTHS = (24, 10, 10, 8, 11)  # bits of the fields of a move, which leave the sign of int64 alone

Held = tuple[tuple[int, ...], ...]  # [R, S] logical experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Slot `slot` of `rank` in `layer` is to hold `expert`, or nothing where that is EMPTY.

    `number` counts moves from 1, so that two like ones are told apart.
    """

    number: int
    layer: int
    rank: int
    slot: int
    expert: int

    def word(self) -> int:
        """The move as one positive integer that fits int64; `move_of` is its inverse.

        The number is taken modulo 2^24, and is never 0. Example: move 1 of expert 2 to slot 0 of
        rank 0 in layer 0 is 2^39 + 3: the number comes first, the expert last and plus 1.
        """
        number = (self.number - 1) % (2 ** WIDTHS[0] - 1) + 1
        word = 0
        fields = (number, self.layer, self.rank, self.slot, self.expert + 1)
        for value, width in zip(fields, WIDTHS, strict=True):
            assert 0 <= value < 1 << width, (self, value, width)
            word = word << width | value
        return word


def move_of(word: int) -> Move | None:
    """The move that `Move.word` made `word` from; None for 0, which is none."""
    if not word:
        return None
    fields: list[int] = []
    for width in reversed(WIDTHS):
        fields.append(word & (1 << width) - 1)
        word >>= width
    expert, slot, rank, layer, number = fields
    return Move(number=number, layer=layer, rank=rank, slot=slot, expert=expert - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What all ranks hold of the moves so far; alike on all of them.

    `word` is the last move that ended, and `held` what its slot holds since. The stall of a pass is
    the time that its part of a move takes: of a broadcast on the fastest rank, since who comes
    first waits, as it would in the dispatch; of other parts on the slowest.
    """

    word: int = 0
    held: int = EMPTY
    num_done: int = 0
    num_failed: int = 0
    num_bytes: int = 0  # sent to every rank
    stall_us: int = 0  # of all passes together
    max_stall_us: int = 0  # of one pass
    split: tuple[int, ...] = ()  # the shares of copies that were taken last, as the policy has them


def held_by(layer: LayerPlacement, topology: Topology, num_slots: int) -> Held:
    """What the slots of a layer hold at start, in the order of `placement.layout`."""
    held: list[tuple[int, ...]] = []
    for rank in range(topology.num_ranks):
        experts = sorted(copy.expert for copy in layer.replicas if copy.rank == rank)
        held.append((*experts, *(EMPTY,) * (num_slots - len(experts))))
    return tuple(held)


def with_slot(held: Held, rank: int, slot: int, expert: int) -> Held:
    """`held` with `expert` in one slot."""
    slots = list(held[rank])
    slots[slot] = expert
    return (*held[:rank], tuple(slots), *held[rank + 1 :])


def replicas_in(held: Held) -> tuple[Replica, ...]:
    """The replicas of a layer, by rank and slot."""
    return tuple(
        Replica(expert=expert, rank=rank)
        for rank, slots in enumerate(held)
        for expert in slots
        if expert != EMPTY
    )


def steps_between(held: Held, wanted: Sequence[Replica]) -> list[tuple[int, int, int]]:
    """The fewest changes (rank, slot, expert) that make `held` hold `wanted`; empty slots first.

    A replica that stays keeps its slot. Example: ((3, -1), (0, 1)) with 5 wanted beside 3 on rank 0
    and 1 alone on rank 1: slot 1 of rank 0 gets 5, slot 0 of rank 1 nothing.
    """
    steps: list[tuple[int, int, int]] = []
    for rank, slots in enumerate(held):
        target = {copy.expert for copy in wanted if copy.rank == rank}
        free = [slot for slot, expert in enumerate(slots) if expert not in target]
        free.sort(key=lambda slot, slots=slots: slots[slot] != EMPTY)  # type: ignore[misc]
        new = sorted(target - set(slots))
        steps += [(rank, slot, expert) for slot, expert in zip(free, new, strict=False)]
        steps += [(rank, slot, EMPTY) for slot in free[len(new) :] if slots[slot] != EMPTY]
    return steps
