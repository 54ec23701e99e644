"""Real gloo ranks for the tests: four processes, and among them a group of two.

A test sends a function of this folder and one payload a rank; every rank runs it in step with the
others and sends back what it returned. What a rank raises is raised in the test.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

NUM_PROCESSES = 4
GROUP_SIZES = (2, 4)
TIMEOUT_S = 60.0

RankFunction: TypeAlias = Callable[[dist.ProcessGroup, int, Any], Any]


class Ranks:
    """The processes; `run` is one collective call."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(NUM_PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, str(folder / "store")), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: RankFunction, payloads: Sequence[Any]) -> list[Any]:
        """`function(group, rank, payload)` on as many ranks as there are payloads."""
        assert len(payloads) in GROUP_SIZES
        for pipe, payload in zip(self._pipes, payloads, strict=False):
            pipe.send_bytes(pickle.dumps((len(payloads), function, payload)))
        answers = [self._answer(pipe) for pipe in self._pipes[: len(payloads)]]
        for error, _ in answers:
            assert not error, error
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5.0)
            process.kill()

    @staticmethod
    def _answer(pipe: Connection) -> tuple[str, Any]:
        assert pipe.poll(TIMEOUT_S), "a rank did not answer"
        answer: tuple[str, Any] = pickle.loads(pipe.recv_bytes())
        return answer


def _serve(pipe: Connection, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    groups = {size: dist.new_group(list(range(size))) for size in GROUP_SIZES}
    while True:
        try:
            num_ranks, function, payload = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = ("", function(groups[num_ranks], rank, payload))
        except BaseException:  # noqa: BLE001 - raised again in the test, by its text
            answer = (f"rank {rank}: {traceback.format_exc()}", None)
        pipe.send_bytes(pickle.dumps(answer))
