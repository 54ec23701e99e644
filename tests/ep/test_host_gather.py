"""Laws of the messages in shared memory: whole, of this turn, of every rank, or waited for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.ep import host_gather as module
from sglang_moelb.ep.host_gather import GroupGather, MemoryGather, host_gather

from .ranks import Ranks

NUM_WORDS = 5


def pair() -> tuple[MemoryGather, MemoryGather]:
    file = os.memfd_create("test")
    os.truncate(file, MemoryGather.num_bytes(2, NUM_WORDS))
    both = tuple(MemoryGather(file, rank, 2, NUM_WORDS) for rank in range(2))
    os.close(file)
    return both  # type: ignore[return-value]


def words(turn: int, rank: int) -> list[int]:
    return [turn, rank, -(2**62), 2**62, turn * rank]


def test_every_turn_brings_the_words_of_its_turn_in_rank_order() -> None:
    first, second = pair()
    for turn in range(7):
        first.start(words(turn, 0))
        second.start(words(turn, 1))
        expected = [words(turn, 0), words(turn, 1)]
        assert first.finish() == expected
        # The first rank is a turn ahead before the second has read this one.
        first.start(words(turn + 100, 0))
        assert second.finish() == expected
        second.start(words(turn + 100, 1))
        first.finish()
        second.finish()


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
def test_a_late_rank_is_waited_for(delay_s: float) -> None:
    first, second = pair()

    def late() -> None:
        time.sleep(delay_s)
        second.start(words(0, 1))

    thread = threading.Thread(target=late)
    first.start(words(0, 0))
    thread.start()
    assert first.finish() == [words(0, 0), words(0, 1)]
    thread.join()


def test_a_packet_that_is_half_written_is_not_taken() -> None:
    first, second = pair()
    first.start(words(0, 0))
    second.start(words(0, 1))
    assert first._read(1) == words(0, 1)
    place = first._place(1)
    for byte in range(8 * (1 + NUM_WORDS) + 4):
        kept = first._memory[place + byte]
        first._memory[place + byte] = kept ^ 1
        assert first._read(1) is None, byte
        first._memory[place + byte] = kept


def test_a_rank_that_never_comes_ends_the_wait_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.01)
    first, _ = pair()
    first.start(words(0, 0))
    with pytest.raises(RuntimeError, match="rank 1 has not begun a pass"):
        first.finish()


def gathered(group: dist.ProcessGroup, rank: int, how: str) -> tuple[str, list[list[int]]]:
    open_file = os.open
    if how == "one cannot open":
        def refuse(name: Any, *args: Any) -> int:
            if rank == 1 and "moelb-" in str(name):
                raise FileNotFoundError(name)
            return open_file(name, *args)

        os.open = refuse  # type: ignore[assignment]
    try:
        gather = host_gather(group, NUM_WORDS, one_host=how != "many hosts")
    finally:
        os.open = open_file
    gather.start(words(0, rank))
    theirs = torch.tensor([1])
    dist.all_reduce(theirs, group=group)
    return type(gather).__name__, gather.finish()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "expected"),
    [("one host", MemoryGather), ("one cannot open", GroupGather), ("many hosts", GroupGather)],
)
def test_all_ranks_choose_alike_and_leave_no_file(ranks: Ranks, how: str, expected: type) -> None:
    before = set(Path("/dev/shm").glob("moelb-*"))
    answers = ranks.run(gathered, [how] * 4)
    assert answers == [(expected.__name__, [words(0, rank) for rank in range(4)])] * 4
    assert set(Path("/dev/shm").glob("moelb-*")) <= before
