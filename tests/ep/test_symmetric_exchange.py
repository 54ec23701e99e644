"""Laws of the exchange through symmetric memory, on two ranks of one process that share a list."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from sglang_moelb.ep.exchange import SymmetricExchange
from sglang_moelb.ep.observe import observe

NUM_RANKS, MAX_WIDTH, NUM_EXPERTS = 2, 120, 4
HOST = torch.device("cpu")


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[SymmetricExchange]:
    buffers: list[torch.Tensor] = []

    def get_buffer(rank: int, shape: tuple[int], dtype: Any, start: int) -> torch.Tensor:
        return buffers[rank][start : start + shape[0]]

    def rendezvous(buffer: torch.Tensor, name: str) -> Any:
        buffers.append(buffer)
        return SimpleNamespace(barrier=lambda channel: None, get_buffer=get_buffer)

    monkeypatch.setattr(symmetric, "empty", torch.empty)
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(dist, "get_world_size", lambda group: NUM_RANKS)
    group: Any = SimpleNamespace(group_name="pair")
    return [SymmetricExchange(group, MAX_WIDTH, HOST) for _ in range(NUM_RANKS)]


def test_rows_of_any_width_come_in_rank_order_turn_after_turn(
    pair: list[SymmetricExchange],
) -> None:
    leader, other = pair
    for turn, width in enumerate((3, MAX_WIDTH, 3, 7, 3)):
        mine = torch.arange(width, dtype=torch.int32) + 100 * turn
        theirs = mine + 50
        other.offer(theirs)
        gathered_RW = leader.gather(mine)
        assert gathered_RW.dtype == torch.int32
        assert torch.equal(gathered_RW, torch.stack([mine, theirs]))


def test_a_row_that_lies_in_its_place_is_not_copied_and_one_elsewhere_is(
    pair: list[SymmetricExchange],
) -> None:
    leader, other = pair
    for turn in range(3):
        place_W = leader.place(5)
        assert place_W is not None
        place_W.fill_(turn)
        other.offer(torch.full((5,), turn + 10, dtype=torch.int32))
        assert leader.gather(place_W).tolist() == [[turn] * 5, [turn + 10] * 5]


def test_what_a_peer_reads_is_not_written_before_the_next_turn_is_over(
    pair: list[SymmetricExchange],
) -> None:
    leader, _ = pair
    places = []
    for _ in range(3):
        place_W = leader.place(5)
        assert place_W is not None
        places.append(place_W.data_ptr())
        leader.offer(place_W)
    assert places[0] != places[1]
    assert places[0] == places[2]


def test_a_row_wider_than_the_buffer_is_refused(pair: list[SymmetricExchange]) -> None:
    with pytest.raises(AssertionError, match="121, 120"):
        pair[0].gather(torch.zeros(MAX_WIDTH + 1, dtype=torch.int32))


def test_observing_counts_straight_into_the_place_and_only_who_wants_it_gets_the_counts(
    pair: list[SymmetricExchange],
) -> None:
    leader, other = pair
    flags_T = torch.zeros(3, dtype=torch.uint8)
    for turn in range(3):
        ids_L = [torch.tensor([[0, 1], [turn, 3], [-1, -1]]) for _ in range(2)]
        theirs_L = [torch.tensor([[2, 3], [-1, -1], [2, 3]]) for _ in range(2)]
        options = {"flags_T": flags_T, "num_experts": NUM_EXPERTS}
        assert observe(theirs_L, exchange=other, wanted=False, **options) is None
        counts_RLW = observe(ids_L, exchange=leader, **options)
        assert counts_RLW is not None
        rows_RLE = counts_RLW[:, :, 8:].view(NUM_RANKS, 2, NUM_EXPERTS, 5)[..., 0]
        expected = torch.bincount(torch.tensor([0, 1, turn, 3]), minlength=NUM_EXPERTS).tolist()
        assert rows_RLE.tolist() == [[expected] * 2, [[0, 0, 2, 2]] * 2]
