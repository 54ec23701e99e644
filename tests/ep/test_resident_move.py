"""Laws of moving resident replicas between passes, on real ranks.

Shape letters: R ranks, T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.controller.moves import EMPTY, Move
from sglang_moelb.ep.agreed import Sizes
from sglang_moelb.ep.resident import move
from sglang_moelb.ep.resident.formats import FORMATS
from sglang_moelb.placement import LayerPlacement, Replica

from .moved import World
from .ranks import Ranks
from .test_resident import PLACEMENTS, ByReference, computed_as_planned, routing

pytestmark = pytest.mark.dist


def to(number: int, rank: int, slot: int, expert: int) -> Move:
    return Move(number=number, layer=0, rank=rank, slot=slot, expert=expert)


# From `PLACEMENTS`; the slots of a rank stay in ascending order, as a fresh start has them.
MOVES = {
    2: [to(1, 1, 1, 3), to(2, 0, 0, 4), to(3, 0, 1, 7), to(4, 1, 0, 0)],  # 3 and 7 are low, 7 twice
    4: [to(1, 1, 0, 5), to(2, 3, 0, EMPTY), to(3, 0, 0, 7), to(4, 2, 1, 0), to(5, 2, 1, EMPTY)],
}
MOVED = {
    2: ((0, 1), (3, 1), (4, 0), (7, 0)),
    4: ((5, 1), (5, 3), (7, 0)),
}


def placed_anew(num_ranks: int) -> LayerPlacement:
    copies = tuple(Replica(expert=expert, rank=rank) for expert, rank in MOVED[num_ranks])
    return LayerPlacement(replicas=copies, low_experts=PLACEMENTS[num_ranks].low_experts)


def outputs_after_moves(group: dist.ProcessGroup, rank: int, given: tuple[str, Any]) -> Any:
    num_ranks, (name, routed) = dist.get_world_size(group), given
    world = World(group, rank, PLACEMENTS[num_ranks], name)
    addresses = [t.data_ptr() for t in (world.copies._copies_L[0], world.copies._num_copies_L[0])]
    moved = world.run_moves(MOVES[num_ranks])
    kept = [t.data_ptr() for t in (world.copies._copies_L[0], world.copies._num_copies_L[0])]
    assert kept == addresses, "a captured graph would read the old maps"
    with ByReference():
        return moved, world.outputs(routed), world.mover.told()


def outputs_of_fresh_start(group: dist.ProcessGroup, rank: int, given: tuple[str, Any]) -> Any:
    name, routed = given
    world = World(group, rank, placed_anew(dist.get_world_size(group)), name)
    with ByReference():
        return world.outputs(routed)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_after_moves_the_outputs_are_those_of_a_fresh_start_bit_for_bit(
    ranks: Ranks, name: str, num_ranks: int
) -> None:
    given = name, routing(num_ranks, "random")
    after = ranks.run(outputs_after_moves, [given] * num_ranks)
    fresh = ranks.run(outputs_of_fresh_start, [given] * num_ranks)
    for rank in range(num_ranks):
        moved, found, told = after[rank]
        assert torch.equal(found.view(torch.uint8), fresh[rank].view(torch.uint8)), rank
        assert moved == after[0][0], "all ranks tell the same"
        assert (told["num_done"], told["num_failed"]) == (len(MOVES[num_ranks]), 0)
        assert told["pending"] is None
    assert any(not torch.equal(a, b) for a, b in zip(*(
        [x[1] for x in after], ranks.run(outputs_at_start, [given] * num_ranks)
    ), strict=True))  # fmt: skip


def outputs_at_start(group: dist.ProcessGroup, rank: int, given: tuple[str, Any]) -> Any:
    name, routed = given
    world = World(group, rank, PLACEMENTS[dist.get_world_size(group)], name)
    with ByReference():
        return world.outputs(routed)


def outputs_in_every_pass(group: dist.ProcessGroup, rank: int, routed: Any) -> Any:
    num_ranks = dist.get_world_size(group)
    world = World(group, rank, PLACEMENTS[num_ranks])
    found, maps = [], []

    def note() -> None:
        with ByReference():
            found.append(world.outputs(routed))
        maps.append(world.maps())

    world.run_moves(MOVES[num_ranks], after_pass=note)
    return found, maps


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_in_every_pass_of_a_move_each_row_is_computed_once_by_its_logical_expert(
    ranks: Ranks, num_ranks: int
) -> None:
    routed = routing(num_ranks, "random")
    by_rank = ranks.run(outputs_in_every_pass, [routed] * num_ranks)
    exact = computed_as_planned(routed, num_ranks, "fp8")
    num_passes = len(by_rank[0][0])
    assert num_passes > 4 * len(MOVES[num_ranks])
    for at in range(num_passes):
        assert all(one[1][at] == by_rank[0][1][at] for one in by_rank), "maps differ"
        found = sum(one[0][at].float() for one in by_rank)
        # Which rows meet a float8 copy changes: 8 % as in `test_resident`, at either time.
        assert (found - exact).norm() <= 0.12 * exact.norm(), at


def corrupted(group: dist.ProcessGroup, rank: int, what: str) -> Any:
    """One move whose bytes change on the way to rank 1, then the same again without."""
    world = World(group, rank, PLACEMENTS[dist.get_world_size(group)])
    before_maps, wanted = world.maps(), to(1, 1, 1, 3)
    slot = world.mover._slot_of(wanted) if rank == 1 else None
    before_slot = slot.w13.view(torch.uint8).clone() if slot else None
    send, write = move.dist.broadcast, move.copy_expert

    def bad_send(tensor: Any, source: int, **options: Any) -> Any:
        send(tensor, source, **options)
        if rank == 1:
            tensor[7] ^= 4

    def bad_write(into: Any, source: Any) -> None:
        write(into, source)
        if rank == 1 and slot is not None and into.w13.data_ptr() == slot.w13.data_ptr():
            into.w13_scale.view(torch.uint8).view(-1)[0] ^= 1

    if what == "transfer":
        move.dist.broadcast = bad_send  # type: ignore[assignment]
    else:
        move.copy_expert = bad_write
    try:
        moved = world.run_moves([wanted])
    finally:
        move.dist.broadcast, move.copy_expert = send, write  # type: ignore[assignment]
    is_kept = before_slot is None or torch.equal(slot.w13.view(torch.uint8), before_slot)
    maps = world.maps()
    again = world.run_moves([to(2, 1, 1, 3)])
    return moved, before_maps == maps, is_kept, maps[1], again


def test_a_corrupted_transfer_keeps_the_last_good_placement_and_is_told(ranks: Ranks) -> None:
    answers = ranks.run(corrupted, ["transfer"] * 2)
    for moved, maps_kept, slot_kept, _, again in answers:
        assert (moved.num_done, moved.num_failed, moved.held) == (0, 1, 2)
        assert maps_kept
        assert slot_kept
        assert (again.num_done, again.num_failed, again.held) == (1, 1, 3)


def test_a_slot_that_holds_wrong_bytes_never_gets_a_row(ranks: Ranks) -> None:
    answers = ranks.run(corrupted, ["write"] * 2)
    for moved, _, _, num_copies, again in answers:
        assert (moved.num_done, moved.num_failed, moved.held) == (0, 1, EMPTY)
        assert num_copies[2] == num_copies[3] == 1, "neither the old replica nor the new one"
        assert (again.num_done, again.held) == (1, 3)


KIB = 1 << 10


def stalls(group: dist.ProcessGroup, rank: int, slow: tuple[int, float]) -> Any:
    """Lengths of chunks on a device that sends so many bytes a millisecond, at that limit."""
    bytes_per_ms, move_ms = slow
    chunks: list[int] = []
    send, sizes_of_chunks = move.dist.broadcast, (move.FIRST_CHUNK_BYTES, move.LEAST_CHUNK_BYTES)

    def noted(tensor: Any, source: int, **options: Any) -> Any:
        chunks.append(tensor.numel())
        send(tensor, source, **options)

    move.FIRST_CHUNK_BYTES, move.LEAST_CHUNK_BYTES = 16 * KIB, KIB
    world = World(group, rank, PLACEMENTS[2])
    report = world.mover.report

    def timed(sizes: Sizes) -> Sizes:
        told, under_way = report(sizes), world.mover._move
        if not told.move_us or under_way is None or under_way.part is not move.Part.SEND:
            return told
        return replace(told, move_us=max(chunks[-1] * 1000 // bytes_per_ms, 1))

    world.mover.report = timed  # type: ignore[method-assign]
    move.dist.broadcast = noted
    try:
        world.run_moves([to(1, 1, 1, 3), to(2, 1, 1, 2)], move_ms=move_ms)
    finally:
        move.dist.broadcast = send
        move.FIRST_CHUNK_BYTES, move.LEAST_CHUNK_BYTES = sizes_of_chunks
    return chunks, world.mover.num_bytes


@pytest.mark.parametrize(("bytes_per_ms", "move_ms"), [(16 * KIB, 0.5), (64 * KIB, 0.3)])
def test_every_chunk_after_the_first_keeps_within_the_stall_that_is_allowed(
    ranks: Ranks, bytes_per_ms: int, move_ms: float
) -> None:
    (chunks, num_bytes), other = ranks.run(stalls, [(bytes_per_ms, move_ms)] * 2)
    assert other == (chunks, num_bytes), "every rank sends the same chunks"
    assert sum(chunks) == 2 * num_bytes
    allowed = bytes_per_ms * move_ms
    assert max(chunks[1:]) <= allowed
    assert sum(chunks[1:]) > 0.5 * allowed * len(chunks[1:]), "the allowed stall is used"


def idle(group: dist.ProcessGroup, rank: int, how: str) -> Any:
    world = World(group, rank, PLACEMENTS[2])
    report, num_reports = world.mover.report, 0

    def seldom(sizes: Sizes) -> Sizes:
        nonlocal num_reports
        num_reports += 1
        return report(sizes) if num_reports % 4 == 0 else sizes

    if how == "device behind" and rank == 1:
        world.mover.report = seldom  # type: ignore[method-assign]
    num_tokens = 0 if how == "all idle" or (how == "no tokens" and rank == 1) else 5
    moved = world.run_moves(MOVES[2], num_tokens=num_tokens)
    return moved.num_done, moved.num_failed, world.maps(), world.mover.told()["held"]


@pytest.mark.parametrize("how", ["no tokens", "all idle", "device behind"])
def test_a_rank_without_tokens_or_behind_takes_part_and_nobody_waits(
    ranks: Ranks, how: str
) -> None:
    mine, other = ranks.run(idle, [how] * 2)
    assert mine == other
    assert mine[:2] == (len(MOVES[2]), 0)
    assert mine[3] == [[[4, 7], [0, 3]]]


def paused(group: dist.ProcessGroup, rank: int, _: None) -> Any:
    world = World(group, rank, PLACEMENTS[2])
    wanted = to(1, 1, 1, 3)
    for _ in range(3):
        world.run_pass(wanted)
    world.run_pass(wanted, move_ms=0)
    still = world.mover.told()
    for _ in range(5):
        world.run_pass(wanted, move_ms=0)
    assert still["pending"]
    assert world.mover.told() == still
    return world.run_moves([wanted]).num_done


def test_a_limit_of_0_stops_a_move_where_it_is_and_it_goes_on_later(ranks: Ranks) -> None:
    assert ranks.run(paused, [None] * 2) == [1, 1]
