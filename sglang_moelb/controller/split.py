"""Shares of an expert's copies: how many of its rows each gets, so that ranks have equal rows.

Pure. In units of 1/UNITS; all copies of an expert have UNITS together and each at least one.

1. The replicated experts of a layer, hottest first, give back their rows and deal them again, unit
   by unit, to the copy whose rank has least. Some sweeps: each lowers the sum of squares of the
   ranks' rows, whose minimum is also that of the busiest rank.
2. A plan whose busiest rank has more rows than an even split's is not used.
3. A plan replaces the shares that there are only where the busiest rank loses MIN_GAIN of its rows,
   or where those are worse than an even split; else shares would follow noise.

A layer's change travels expert by expert, each as one integer of the policy, NUM_WORDS at a time:
the next ones go when all ranks have applied the last. One integer ends all shares.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sglang_moelb.placement import LayerPlacement
from sglang_moelb.types import FloatArray, IntArray, Topology

UNITS = 64
MOST_SHARED = 7  # copies of an expert that can have shares; more split evenly
NUM_WORDS = 16  # experts whose shares a policy carries
NUM_SWEEPS = 4
MIN_GAIN = 0.02
NEAR = 1e-9  # by which sums of rows as floats may differ though they are equal
LAYERS_A_PASS = 4
WIDTHS = (10, 11, 3)  # bits of layer, expert and number of shares; then six bits a bound

EVERY_LAYER, EVERY_EXPERT = ((1 << width) - 1 for width in WIDTHS[:2])

Shares = Mapping[int, tuple[int, ...]]  # by expert; its original first, then by rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """`shares` of the copies of `expert`, or none: an even split.

    `turn` is 1 to 3, so that two like ones that follow one another are told apart.
    """

    layer: int
    expert: int
    shares: tuple[int, ...]
    turn: int = 1

    @property
    def is_of_all(self) -> bool:
        """Whether it splits every expert of every layer evenly."""
        return (self.layer, self.expert) == (EVERY_LAYER, EVERY_EXPERT)

    def word(self) -> int:
        """As one positive integer that fits int64; `split_of` is its inverse."""
        word = self.turn
        fields = (self.layer, self.expert, len(self.shares))
        for value, width in zip(fields, WIDTHS, strict=True):
            assert 0 <= value < 1 << width, (self, value, width)
            word = word << width | value
        for bound in bounds_of(self.shares):
            word = word << 6 | bound % UNITS
        return word


def split_of(word: int) -> Split | None:
    """What `Split.word` made `word` from; None for 0, which is none."""
    if not word:
        return None
    bounds = [word >> 6 * place & 63 for place in reversed(range(MOST_SHARED - 1))]
    word >>= 6 * (MOST_SHARED - 1)
    fields: list[int] = []
    for width in reversed(WIDTHS):
        fields.append(word & (1 << width) - 1)
        word >>= width
    num_shares, expert, layer = fields
    ends = [0, *bounds[: num_shares - 1], UNITS] if num_shares else []
    shares = tuple(end - begin for begin, end in pairwise(ends))
    return Split(layer=layer, expert=expert, shares=shares, turn=word)


def bounds_of(shares: Sequence[int]) -> list[int]:
    """Where all shares but the last end, as `kernels.choose_copy` reads it; zeros for none.

    Example: shares (16, 8, 40) are the bounds [16, 24, 64, 64, 64, 64].
    """
    if len(shares) < 2:
        return [0] * (MOST_SHARED - 1)
    ends = np.cumsum(shares)[:-1].tolist()
    return [*ends, *(UNITS,) * (MOST_SHARED - 1 - len(ends))]


def ranks_of(layer: LayerPlacement, topology: Topology) -> dict[int, list[int]]:
    """The ranks of each replicated expert's copies, its home first, then ascending."""
    ranks: dict[int, list[int]] = {}
    for replica in sorted(layer.replicas, key=lambda one: one.rank):
        home = replica.expert // topology.experts_per_rank
        ranks.setdefault(replica.expert, [home]).append(replica.rank)
    return ranks


def rank_rows(
    rows_E: IntArray, layer: LayerPlacement, shares: Shares, topology: Topology
) -> FloatArray:
    """Rows of each rank, [R]; experts without shares are split evenly."""
    rows_R: FloatArray = rows_E.reshape(topology.num_ranks, -1).sum(axis=1).astype(np.float64)
    for expert, ranks in ranks_of(layer, topology).items():
        own = shares.get(expert) or (1,) * len(ranks)
        rows_R[ranks[0]] -= rows_E[expert]
        for rank, share in zip(ranks, own, strict=True):
            rows_R[rank] += rows_E[expert] * share / sum(own)
    return rows_R


def plan_shares(rows_E: IntArray, layer: LayerPlacement, topology: Topology) -> Shares:
    """Shares under which the busiest rank has fewest rows; none where an even split is as good."""
    even_R = rank_rows(rows_E, layer, {}, topology)
    ranks = {
        expert: held
        for expert, held in ranks_of(layer, topology).items()
        if len(held) <= MOST_SHARED and rows_E[expert]
    }
    rows = even_R.tolist()
    dealt = {
        expert: {rank: rows_E[expert] / len(held) for rank in held}
        for expert, held in ranks.items()
    }
    shares: dict[int, tuple[int, ...]] = {}
    for _ in range(NUM_SWEEPS):
        for expert in sorted(ranks, key=lambda one: -rows_E[one]):
            held, unit = ranks[expert], float(rows_E[expert]) / UNITS
            for rank in held:
                rows[rank] -= dealt[expert][rank]
            units = _deal({rank: rows[rank] for rank in held}, unit)
            for rank in held:
                dealt[expert][rank] = units[rank] * unit
                rows[rank] += units[rank] * unit
            shares[expert] = tuple(units[rank] for rank in held)
    busiest = float(rank_rows(rows_E, layer, shares, topology).max())
    return shares if busiest < (1 - NEAR) * float(even_R.max()) else {}


def _deal(rows: Mapping[int, float], unit: float) -> dict[int, int]:
    """UNITS of `unit` rows dealt to ranks that have `rows`: one to each, then to who has least."""
    units = dict.fromkeys(rows, 1)
    heap = [(have + unit, rank) for rank, have in rows.items()]
    heapq.heapify(heap)
    for _ in range(UNITS - len(rows)):
        least, rank = heap[0]
        units[rank] += 1
        heapq.heapreplace(heap, (least + unit, rank))
    return units


class Splitting:
    """Follows the shares that there are and says which are to change; not thread-safe."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._shares: list[dict[int, tuple[int, ...]]] = [{} for _ in range(topology.num_layers)]
        self._ranks: list[dict[int, list[int]]] = [{} for _ in range(topology.num_layers)]
        self._followed: tuple[LayerPlacement, ...] = ()
        self._queue: deque[Split] = deque()
        self._next_layer = 0
        self.words: tuple[int, ...] = ()  # for the policy
        self._num_issues = 0
        self.reason = "no passes yet"

    def shares_of(self, layers: tuple[LayerPlacement, ...]) -> tuple[Shares, ...]:
        """Shares by layer as said last, of experts whose copies are still those of `layers`."""
        self._follow(layers)
        return tuple(self._shares)

    def _follow(self, layers: tuple[LayerPlacement, ...]) -> None:
        """An expert whose copies have changed is split evenly, as the ranks do by themselves."""
        if layers is self._followed:  # a look at all costs milliseconds
            return
        self._followed = layers
        for number, layer in enumerate(layers):
            ranks = ranks_of(layer, self._topology)
            for expert, held in self._ranks[number].items():
                if ranks.get(expert) != held:
                    self._shares[number].pop(expert, None)
            self._ranks[number] = ranks

    def step(
        self,
        rows_LE: IntArray,
        layers: tuple[LayerPlacement, ...],
        applied: tuple[int, ...],
        *,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        """Take in the window's rows and the words that all ranks have applied last.

        `skip` are layers with a move under way; an expert whose copies changed is split evenly.
        """
        self._follow(layers)
        if self.words != applied:
            return
        for _ in range(min(LAYERS_A_PASS, len(layers))):
            if len(self._queue) >= NUM_WORDS:
                break
            number, self._next_layer = self._next_layer, (self._next_layer + 1) % len(layers)
            if number not in skip:
                self._look(number, rows_LE[number], layers[number])
        self._issue(skip)

    def end(self) -> None:
        """All copies are to be split evenly, whether the last change has been applied or not."""
        self._queue.clear()
        if not any(self._shares):
            return
        for shares in self._shares:
            shares.clear()
        self._say([Split(layer=EVERY_LAYER, expert=EVERY_EXPERT, shares=())])
        self.reason = "all copies are split evenly, as resident.split asks"

    def _look(self, number: int, rows_E: IntArray, layer: LayerPlacement) -> None:
        old = self._shares[number]
        wanted = plan_shares(rows_E, layer, self._topology)
        even, now, after = (
            float(rank_rows(rows_E, layer, one, self._topology).max()) for one in ({}, old, wanted)
        )
        if not even or (after > (1 - MIN_GAIN) * now and now <= (1 + NEAR) * even):
            return
        self.reason = (
            f"layer {number}'s busiest rank has {now:.0f} rows, {even:.0f} with an even split and "
            f"{after:.0f} with other shares"
        )
        for expert in sorted({*old, *wanted}, key=lambda one: -rows_E[one]):
            shares = wanted.get(expert, ())
            if shares != old.get(expert, ()):
                self._queue.append(Split(layer=number, expert=expert, shares=shares))

    def _issue(self, skip: frozenset[int]) -> None:
        splits: list[Split] = []
        while self._queue and len(splits) < NUM_WORDS:
            split = self._queue.popleft()
            ranks = self._ranks[split.layer].get(split.expert, [])
            if split.layer in skip or len(split.shares) not in (0, len(ranks)):
                continue
            self._shares[split.layer].pop(split.expert, None)
            if split.shares:
                self._shares[split.layer][split.expert] = split.shares
            splits.append(split)
        if splits:
            self._say(splits)

    def _say(self, splits: Sequence[Split]) -> None:
        turn = self._num_issues % 3 + 1
        self._num_issues += 1
        self.words = tuple(replace(split, turn=turn).word() for split in splits)
