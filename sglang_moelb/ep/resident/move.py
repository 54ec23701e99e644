"""Moves of resident replicas between passes: an expert reaches a slot in parts, one part a pass.

Every rank does the same parts in the same passes, because each part follows from numbers that all
have agreed on: the move from the policy, and from the agreement of every pass what each rank
reports of the part under way, once its device has done it. So nobody waits for a device, no clock
of one rank decides about a collective, and a rank without tokens takes part like the others.

1. `PREPARE`: the expert's home writes its low bytes to its staging room: quantised from a high
   original as at start, or copied from a low one.
2. `SEND`: the bytes are broadcast in chunks into the staging room of every rank. The size of the
   next chunk follows from what the last one took, so that a pass stalls `move_ms` at most.
3. `CHECK`: the sums of source and target must be equal. Where they are not, nothing has changed.
4. `LEAVE`: no row is sent to the slot's old replica any more.
5. `WRITE`: the target copies its staging room to the slot, and sums what the slot then holds.
6. Where that sum is the source's, rows are sent to the new replica; else the slot stays empty.

Shape letters: L MoE layers, R ranks, E logical experts, C copies of an expert.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.controller.moves import EMPTY, Move, Moved, held_by, move_of, with_slot
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.clock import DeviceMark, HostMark, mark_on
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.staging import Staging, checksum, prepare
from sglang_moelb.ep.resident.weights import StoredLayer, copy_expert, only, quantise
from sglang_moelb.placement import LayerLayout, LayerPlacement
from sglang_moelb.types import Topology

logger = logging.getLogger("sglang_moelb")

FIRST_CHUNK_BYTES, LEAST_CHUNK_BYTES = 1 << 18, 1 << 14
USED_SHARE = 0.8  # of the stall that is allowed: parts of one size differ in time
MOST_GROWTH = 2.0


class Part(Enum):
    """What is to be done next."""

    PREPARE = "prepare"
    SEND = "send"
    CHECK = "check"
    LEAVE = "leave"
    WRITE = "write"


@dataclass(slots=True)
class UnderWay:
    """A move that has begun. `chunk_bytes` is the length of the last chunk, `sum` the source's."""

    move: Move
    word: int
    old: int
    part: Part = Part.PREPARE
    num_sent: int = 0
    chunk_bytes: int = 0
    sum: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A part on its way through the device; its sum, if any, is on the host at `ended`."""

    begun: HostMark | DeviceMark
    ended: HostMark | DeviceMark
    host_ms: float


class Mover:
    """Moves replicas of the layers `layers` of this rank; alike on all ranks of the EP group.

    `report` and `advance` take turns, once a pass, on the serving thread (`ep.resident.moving`).
    """

    def __init__(
        self,
        layers: Sequence[Any],
        stored_L: Sequence[StoredLayer],
        layouts_L: Sequence[LayerLayout],
        placed_L: Sequence[LayerPlacement],
        copies: ResidentExperts,
        topology: Topology,
        rank: int,
        group: dist.ProcessGroup,
    ) -> None:
        low = stored_L[0].low
        assert low is not None, "without a slot there is nothing to move"
        self._layers, self._stored_L, self._layouts_L = layers, stored_L, layouts_L
        self._copies = copies
        self._topology, self._rank, self._group = topology, rank, group
        num_slots = layouts_L[0].num_places - topology.experts_per_rank
        self._held_L = [held_by(one, topology, num_slots) for one in placed_L]
        self._staging = Staging(low)
        self._device = low.w13.device
        on_gpu = self._device.type == "cuda"
        self._sum = torch.zeros((), dtype=torch.int64, pin_memory=on_gpu)
        self._warm_up()
        self._chunk_bytes = min(FIRST_CHUNK_BYTES, self._staging.num_bytes)
        self._seen = 0
        self._move: UnderWay | None = None
        self._timed: Timed | None = None
        self.moved = Moved()

    @property
    def num_bytes(self) -> int:
        """Memory that moving takes on this rank."""
        return self._staging.num_bytes

    def report(self, sizes: Sizes) -> Sizes:
        """`sizes` with what this rank has to say of the part under way; does not wait."""
        timed = self._timed
        if timed is None or not timed.ended.is_reached():
            return sizes
        took_ms = max(timed.begun.ms_until(timed.ended), timed.host_ms)  # type: ignore[arg-type]
        return replace(sizes, move_us=max(round(took_ms * 1e3), 1), move_sum=int(self._sum))

    def advance(self, agreed: Agreed) -> None:
        """Do the part of this pass; must be called before its first layer's rows are sent.

        Every rank must come here with the same `agreed`, once a pass.
        """
        if self._timed is not None:
            if any(sizes.move_us == 0 for sizes in agreed.sizes_R):
                return
            self._end_part(agreed, self._timed)
        policy = agreed.policy
        if policy.move_ms <= 0:
            return
        if self._move is None and policy.move != self._seen:
            self._seen = policy.move
            self._begin(policy.move)
        if self._move is not None:
            self._do_part(self._move)

    def told(self) -> dict[str, Any]:
        """For the status, plain JSON types."""
        moved, under_way = self.moved, self._move
        return {
            "num_done": moved.num_done,
            "num_failed": moved.num_failed,
            "num_bytes": moved.num_bytes,
            "stall_ms": moved.stall_us / 1e3,
            "max_stall_ms": moved.max_stall_us / 1e3,
            "chunk_bytes": self._chunk_bytes,
            "pending": None if under_way is None else {
                "layer": under_way.move.layer,
                "rank": under_way.move.rank,
                "slot": under_way.move.slot,
                "expert": under_way.move.expert,
                "instead_of": under_way.old,
                "part": under_way.part.value,
                "sent_bytes": under_way.num_sent,
            },
            "held": [[list(slots) for slots in held] for held in self._held_L],
        }  # fmt: skip

    def _warm_up(self) -> None:
        """Compile, load and pin what parts need before requests come; nothing changes."""
        quantise(self._layers[0], 0, self._staging.weights)
        self._sum.copy_(checksum(self._staging.bytes))
        copies = self._layouts_L[0].copies_EC[0]
        self._copies.send_to(0, 0, copies[copies >= 0].tolist())

    def _begin(self, word: int) -> None:
        move = move_of(word)
        assert move is not None
        old = self._held_L[move.layer][move.rank][move.slot]
        part = Part.LEAVE if move.expert == EMPTY else Part.PREPARE
        self._move = UnderWay(move=move, word=word, old=old, part=part)

    def _do_part(self, one: UnderWay) -> None:
        """Enqueue the next part and begin to time it."""
        begun, host = mark_on(self._device), HostMark()
        move, staging = one.move, self._staging
        home = move.expert // self._topology.experts_per_rank
        if one.part is Part.PREPARE and self._rank == home:
            prepare(staging, self._layers[move.layer], self._stored_L[move.layer],
                    self._layouts_L[move.layer], self._rank, move.expert)  # fmt: skip
        elif one.part is Part.SEND:
            one.chunk_bytes = min(self._chunk_bytes, staging.num_bytes - one.num_sent)
            chunk = staging.bytes[one.num_sent : one.num_sent + one.chunk_bytes]
            dist.broadcast(chunk, dist.get_global_rank(self._group, home), group=self._group)
            one.num_sent += one.chunk_bytes
        elif one.part is Part.CHECK and self._rank in (home, move.rank):
            self._sum.copy_(checksum(staging.bytes), non_blocking=True)
        elif one.part is Part.LEAVE and one.old != EMPTY:
            self._hold(move, EMPTY)
        elif one.part is Part.WRITE and self._rank == move.rank:
            slot = self._slot_of(move)
            copy_expert(slot, staging.weights)
            copy_expert(staging.weights, slot)
            self._sum.copy_(checksum(staging.bytes), non_blocking=True)
        self._timed = Timed(
            begun=begun, ended=mark_on(self._device), host_ms=host.ms_until(HostMark())
        )

    def _end_part(self, agreed: Agreed, timed: Timed) -> None:
        """All ranks have done the part: count it, and go on to the next or end the move."""
        timed.begun.give_back()
        timed.ended.give_back()
        self._timed, one = None, self._move
        assert one is not None
        # Who comes first to a broadcast waits, as it would in the dispatch; the rest is local.
        fastest_or_slowest = min if one.part is Part.SEND else max
        stall_us = fastest_or_slowest(sizes.move_us for sizes in agreed.sizes_R)
        self._count(stall_us, one.chunk_bytes if one.part is Part.SEND else 0)
        move = one.move
        source = move.expert // self._topology.experts_per_rank
        sum_of_target = agreed.sizes_R[move.rank].move_sum
        if one.part is Part.PREPARE:
            one.part = Part.SEND
        elif one.part is Part.SEND:
            self._fit_chunk(one.chunk_bytes, stall_us, agreed.policy.move_ms)
            if one.num_sent == self._staging.num_bytes:
                one.part = Part.CHECK
        elif one.part is Part.CHECK:
            one.sum = agreed.sizes_R[source].move_sum
            if sum_of_target == one.sum:
                one.part = Part.LEAVE
            else:
                self._end(one, held=one.old, is_done=False)
        elif one.part is Part.LEAVE:
            if move.expert == EMPTY:
                self._end(one, held=EMPTY, is_done=True)
            one.part = Part.WRITE
        elif sum_of_target == one.sum:
            self._hold(move, move.expert)
            self._end(one, held=move.expert, is_done=True)
        else:
            self._end(one, held=EMPTY, is_done=False)

    def _count(self, stall_us: int, num_bytes: int) -> None:
        moved = self.moved
        self.moved = replace(
            moved,
            num_bytes=moved.num_bytes + num_bytes,
            stall_us=moved.stall_us + stall_us,
            max_stall_us=max(moved.max_stall_us, stall_us),
        )

    def _fit_chunk(self, num_bytes: int, stall_us: int, move_ms: float) -> None:
        """Make the next chunk as long as the allowed stall lets it be, by what the last took."""
        fits = num_bytes * min(USED_SHARE * 1e3 * move_ms / stall_us, MOST_GROWTH)
        if num_bytes < min(self._chunk_bytes, fits):
            return  # the end of an expert, too short to learn from
        whole = int(fits) // LEAST_CHUNK_BYTES * LEAST_CHUNK_BYTES
        self._chunk_bytes = min(max(whole, LEAST_CHUNK_BYTES), self._staging.num_bytes)

    def _end(self, one: UnderWay, *, held: int, is_done: bool) -> None:
        self._move, moved, move = None, self.moved, one.move
        self.moved = replace(
            moved,
            word=one.word,
            held=held,
            num_done=moved.num_done + is_done,
            num_failed=moved.num_failed + (not is_done),
        )
        if self._rank != 0:
            return
        where = f"slot {move.slot} of rank {move.rank} in layer {move.layer}"
        if is_done:
            logger.info("sglang_moelb: %s holds expert %d, before %d", where, held, one.old)
        else:
            logger.error(
                "sglang_moelb: expert %d arrived with wrong bytes for %s, which holds expert %d "
                "(-1: none)", move.expert, where, held,
            )  # fmt: skip

    def _hold(self, move: Move, expert: int) -> None:
        """Send rows to slot `move` as to `expert` from now on, and no more as to what it held."""
        before = self._held_L[move.layer]
        held = self._held_L[move.layer] = with_slot(before, move.rank, move.slot, expert)
        layout, per_rank = self._layouts_L[move.layer], self._topology.experts_per_rank
        for changed in {before[move.rank][move.slot], expert} - {EMPTY}:
            replicas = [
                rank * layout.num_places + per_rank + slots.index(changed)
                for rank, slots in enumerate(held)
                if changed in slots
            ]
            home = int(layout.copies_EC[changed, 0])
            self._copies.send_to(move.layer, changed, [home, *replicas])

    def _slot_of(self, move: Move) -> Any:
        low = self._stored_L[move.layer].low
        assert low is not None
        num_own_low = len(self._layouts_L[move.layer].low[self._rank])
        return only(low, num_own_low + move.slot)
