"""Laws of the shares of resident copies on real ranks.

Shape letters: T tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.controller.moves import EMPTY, Move
from sglang_moelb.controller.split import EVERY_EXPERT, EVERY_LAYER, UNITS, Split

from .moved import World
from .ranks import Ranks
from .test_resident import PLACEMENTS, Chosen, routing
from .test_resident_move import ByReference

pytestmark = pytest.mark.dist


def shared(num_ranks: int) -> list[Split]:
    """Uneven shares of all replicated experts; the original gets most."""
    copies: dict[int, int] = {}
    for replica in PLACEMENTS[num_ranks].replicas:
        copies[replica.expert] = copies.get(replica.expert, 1) + 1
    return [
        Split(layer=0, expert=expert, shares=(UNITS - 5 * (number - 1), *(5,) * (number - 1)))
        for expert, number in copies.items()
    ]


def outputs_by_shares(group: dist.ProcessGroup, rank: int, routed: Any) -> Any:
    num_ranks = dist.get_world_size(group)
    world = World(group, rank, PLACEMENTS[num_ranks])
    splits = shared(num_ranks)
    with ByReference():
        before = world.outputs(routed)
    addresses = [one.data_ptr() for one in world.copies._bounds_L]
    words = tuple(split.word() for split in splits)
    agreed = world.run_pass(None, split=words, num_tokens=rank)
    assert agreed.moved is not None
    assert agreed.moved.split == words, "it is told what has been taken"
    assert [one.data_ptr() for one in world.copies._bounds_L] == addresses
    rows = []
    for split in splits:
        ids_T1 = torch.full((10 * UNITS, 1), split.expert)
        chosen_T = world.copies.physical(0, Chosen(ids_T1)).topk_ids.flatten()
        own = world.maps()[0][split.expert][: len(split.shares)]
        rows.append([int((chosen_T == copy).sum()) for copy in own])
    with ByReference():
        after = world.outputs(routed)
    told = world.copies.told()
    replica = PLACEMENTS[num_ranks].replicas[0]
    slot = world.mover.told()["held"][0][replica.rank].index(replica.expert)
    empty = Move(number=1, layer=0, rank=replica.rank, slot=slot, expert=EMPTY)
    for _ in range(10):
        world.run_pass(empty, split=words)
    at_end = world.copies.told()
    of_all = Split(layer=EVERY_LAYER, expert=EVERY_EXPERT, shares=())
    world.run_pass(empty, split=(of_all.word(),))
    assert world.copies.told() == {"num_shared": 0, "shares": []}
    assert not any(bounds_EB.any() for bounds_EB in world.copies._bounds_L)
    return before, after, rows, told, at_end, replica.expert


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_take_shares_in_the_same_pass_and_rows_are_as_planned(
    ranks: Ranks, num_ranks: int
) -> None:
    routed = routing(num_ranks, "random")
    answers = ranks.run(outputs_by_shares, [routed] * num_ranks)
    splits = shared(num_ranks)
    for _, _, rows, told, at_end, expert in answers:
        assert rows == [[10 * share for share in split.shares] for split in splits]
        assert told == answers[0][3]
        assert told["num_shared"] == len(splits)
        assert at_end["num_shared"] == len(splits) - 1, "of other copies than shares were made for"
        assert expert not in [one["expert"] for one in at_end["shares"]]
    before, after = (sum(answer[at].double() for answer in answers) for at in (0, 1))
    assert any(not torch.equal(answer[0], answer[1]) for answer in answers), "rows went elsewhere"
    bound = 0.1 * float(before.abs().max())  # an original may be high, and its replica is in fp8
    assert float((before - after).abs().max()) < bound
