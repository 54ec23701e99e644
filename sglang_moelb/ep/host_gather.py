"""A few integers of every rank to every rank, through the host: the messages of the agreement.

`start` sends, `finish` waits for all; they take turns, and every rank takes part in every turn.
Between ranks of one host the messages lie in shared memory, which takes neither a system call nor
another thread; else the group's own collective carries them.

Shape letters: R ranks.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

NUM_TURNS = 2  # a rank writes a turn's place again only when all have read it: see `MemoryGather`
CHECK_BYTES = 8
LINE_BYTES = 64
SPIN_S, SLEEP_S, TIMEOUT_S = 0.001, 0.0001, 1800.0


class GroupGather:
    """By the all-gather of a gloo group."""

    def __init__(self, group: dist.ProcessGroup, num_words: int) -> None:
        self._group = group
        self._rows = torch.empty(dist.get_world_size(group), num_words, dtype=torch.int64)
        self._work: dist.Work | None = None

    def start(self, words: Sequence[int]) -> None:
        """Send `words`; does not wait."""
        assert self._work is None, "start without finish"
        self._work = dist.all_gather_into_tensor(
            self._rows.view(-1),
            torch.tensor(words, dtype=torch.int64),
            group=self._group,
            async_op=True,
        )

    def finish(self) -> list[list[int]]:
        """The words of every rank, in rank order; waits for them."""
        assert self._work is not None, "finish without start"
        self._work.wait()
        self._work = None
        rows: list[list[int]] = self._rows.tolist()
        return rows


class MemoryGather:
    """By memory that all ranks map: each writes its own place and reads all the others.

    Two places a rank in turn: who begins turn t + 2 has finished t + 1, so all ranks have begun
    t + 1, so all have finished t, whose place is written again. A packet carries its turn and a
    checksum, so one that is half written is not taken, whatever order memory is written in.
    """

    def __init__(self, file: int, rank: int, num_ranks: int, num_words: int) -> None:
        """Map the open file `file`, which must be as long as `num_bytes` says."""
        self._rank = rank
        self._num_ranks = num_ranks
        self._packet = struct.Struct(f"<{1 + num_words}q")
        self._memory = mmap.mmap(file, self.num_bytes(num_ranks, num_words))
        self._place_bytes = _place_bytes(num_words)
        self._turn = 0
        self._words: list[int] | None = None  # this rank's of the turn under way

    @staticmethod
    def num_bytes(num_ranks: int, num_words: int) -> int:
        """Length of the file."""
        return NUM_TURNS * num_ranks * _place_bytes(num_words)

    def start(self, words: Sequence[int]) -> None:
        """Send `words`; does not wait."""
        assert self._words is None, "start without finish"
        self._words = list(words)
        self._turn += 1
        packet = self._packet.pack(self._turn, *words)
        packet += crc32(packet).to_bytes(CHECK_BYTES, "little")
        place = self._place(self._rank)
        self._memory[place : place + len(packet)] = packet

    def finish(self) -> list[list[int]]:
        """The words of every rank, in rank order; waits for them.

        Raises `RuntimeError` when a rank has not sent any for half an hour.
        """
        assert self._words is not None, "finish without start"
        mine, self._words = self._words, None
        return [
            mine if rank == self._rank else self._read(rank) or self._waited(rank)
            for rank in range(self._num_ranks)
        ]

    def _place(self, rank: int) -> int:
        return (self._turn % NUM_TURNS * self._num_ranks + rank) * self._place_bytes

    def _read(self, rank: int) -> list[int] | None:
        """The words of `rank` if they are of this turn and whole."""
        size, place = self._packet.size, self._place(rank)
        packet = self._memory[place : place + size + CHECK_BYTES]
        turn, *words = self._packet.unpack_from(packet)
        if turn != self._turn or crc32(packet[:size]) != int.from_bytes(packet[size:], "little"):
            return None
        return words

    def _waited(self, rank: int) -> list[int]:
        begun_s = time.monotonic()
        while (words := self._read(rank)) is None:
            waited_s = time.monotonic() - begun_s
            if waited_s > TIMEOUT_S:
                raise RuntimeError(f"sglang_moelb: rank {rank} has not begun a pass that this one "
                                   f"began {waited_s:.0f} s ago; see its log")
            # Both let another thread of this process have the interpreter lock.
            time.sleep(0.0 if waited_s < SPIN_S else SLEEP_S)
        return words


def host_gather(
    group: dist.ProcessGroup, num_words: int, *, one_host: bool
) -> GroupGather | MemoryGather:
    """Shared memory where all ranks of the gloo `group` can map one file, else its all-gather."""
    file = _shared_file(group, num_words) if one_host else None
    if file is None:
        return GroupGather(group, num_words)
    gather = MemoryGather(file, dist.get_rank(group), dist.get_world_size(group), num_words)
    os.close(file)
    return gather


def _shared_file(group: dist.ProcessGroup, num_words: int) -> int | None:
    """A file that all ranks have opened and whose name is gone; None on all if one could not."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    name, file = "", None
    if rank == 0:
        memory = Path("/dev/shm")
        file, name = tempfile.mkstemp(prefix="moelb-", dir=memory if memory.is_dir() else None)
        os.truncate(file, MemoryGather.num_bytes(num_ranks, num_words))
    names = [name]
    dist.broadcast_object_list(names, src=dist.get_global_rank(group, 0), group=group)
    if rank != 0:
        try:
            file = os.open(names[0], os.O_RDWR)
        except OSError:  # no host is shared, whatever the flags say
            file = None
    opened = torch.tensor([file is not None], dtype=torch.int64)
    dist.all_reduce(opened, group=group)
    if rank == 0:
        Path(name).unlink()
    if int(opened) == num_ranks:
        return file
    if file is not None:
        os.close(file)
    return None


def _place_bytes(num_words: int) -> int:
    return -(-(8 * (1 + num_words) + CHECK_BYTES) // LINE_BYTES) * LINE_BYTES
