"""Batches without end from worker processes, in an order that does not depend on timing.

Batch b is made by worker b modulo their number, from random numbers seeded by b, with the task
weights of a version that is fixed by b. Each worker owns a few slots, files mapped into memory, and
writes each batch into one of them; the training process reads it there and gives the slot back.

Host; the workers never import torch's devices. Shape letters: none.
"""

from __future__ import annotations

import multiprocessing as mp
import queue
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.probe.encode import Encoded, ItemLike, encode
from benchmarks.probe.item import Split
from benchmarks.probe.pack import Header, pack, slot_bytes, write

Source = Callable[[str, Split, int], ItemLike]  # task, split, index
MAX_VERSIONS = 4096
SLOTS_A_WORKER = 3
PATIENCE_S = 120.0
POLL_S = 0.005
MAX_INDEX = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the workers make."""

    source: Source
    tasks: tuple[str, ...]
    seed: int
    batch_tokens: int
    num_workers: int
    interval: int  # steps between versions of the weights
    reuse: int = 1  # how often an item is shown; more than once when making items is too slow
    pool_items: int = 2048  # a worker's, when items are shown again
    max_item_tokens: int = 4096

    @property
    def lag(self) -> int:
        """Batches between a version of the weights and its first use: more than are in flight."""
        return max(128, 2 * self.num_workers * SLOTS_A_WORKER)


class Weights:
    """Versions of the task weights, in memory shared with the workers."""

    def __init__(self, num_tasks: int) -> None:
        self._table = mp.get_context("fork").RawArray("d", MAX_VERSIONS * num_tasks)
        self._num = mp.get_context("fork").RawValue("i", 0)
        self._num_tasks = num_tasks

    def _rows(self) -> NDArray[np.float64]:
        rows: NDArray[np.float64] = np.frombuffer(self._table, dtype=np.float64)
        return rows.reshape(MAX_VERSIONS, self._num_tasks)

    def append(self, weights: Sequence[float]) -> None:
        """The next version; raises ValueError when there are too many."""
        if self._num.value >= MAX_VERSIONS:
            raise ValueError(f"more than {MAX_VERSIONS} versions: use a longer --interval")
        self._rows()[self._num.value] = np.asarray(weights) / np.sum(weights)
        self._num.value += 1

    def all(self) -> list[list[float]]:
        """All versions so far."""
        versions: list[list[float]] = self._rows()[: self._num.value].tolist()
        return versions

    def wait(self, version: int) -> NDArray[np.float64]:
        """Version `version`, as soon as there is one."""
        while self._num.value <= version:
            time.sleep(POLL_S)
        row: NDArray[np.float64] = self._rows()[version].copy()
        return row


class Maker:
    """Makes batches by number; one in each worker."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self.plan = plan
        self.weights = weights
        self.pool: list[tuple[Encoded, int]] = []

    def make(self, number: int) -> dict[str, NDArray[np.generic]]:
        """Batch `number`: items until the next one would exceed the tokens."""
        plan = self.plan
        rng = np.random.default_rng((plan.seed, number))
        chances = self.weights.wait(max(0, (number - plan.lag) // plan.interval))
        items: list[Encoded] = []
        tasks: list[int] = []
        num_tokens = 0
        while num_tokens < plan.batch_tokens:
            item, task = self._draw(rng, chances)
            num_tokens += len(item.ids_T)
            items.append(item)
            tasks.append(task)
        return pack(items, tasks)

    def _draw(self, rng: np.random.Generator, chances: NDArray[np.float64]) -> tuple[Encoded, int]:
        full = len(self.pool) >= self.plan.pool_items
        if self.plan.reuse > 1 and full and rng.random() > 1 / self.plan.reuse:
            return self.pool[rng.integers(len(self.pool))]
        task = int(np.searchsorted(np.cumsum(chances)[:-1], rng.random(), side="right"))
        name, index = self.plan.tasks[task], int(rng.integers(MAX_INDEX))
        item = encode(self.plan.source(name, "train", index))
        if len(item.ids_T) > self.plan.max_item_tokens:
            most = self.plan.max_item_tokens
            raise ValueError(f"{name} {index}: {len(item.ids_T)} tokens, at most {most}")
        if self.plan.reuse > 1 and not full:
            self.pool.append((item, task))
        elif self.plan.reuse > 1:
            self.pool[rng.integers(len(self.pool))] = (item, task)
        return item, task


def _work(maker: Maker, worker: int, first: int, path: Path, free: Any, ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when to end
    slots = np.memmap(path, dtype=np.uint8, mode="r+").reshape(SLOTS_A_WORKER, -1)
    step = maker.plan.num_workers
    number = first + (worker - first) % step
    try:
        while True:
            arrays = maker.make(number)
            slot = free.get()
            ready.put((number, slot, write(arrays, slots[slot])))
            number += step
    except (ValueError, OSError, KeyError, TypeError, IndexError):
        ready.put((number, -1, traceback.format_exc()))


class Loader:
    """Starts the workers; `take` gives their batches in order."""

    def __init__(self, plan: Plan, weights: Weights, folder: Path, first: int = 0) -> None:
        self.plan = plan
        self._number = first
        self._size = slot_bytes(plan.batch_tokens, plan.max_item_tokens)
        context = mp.get_context("fork")
        self._free = [context.SimpleQueue() for _ in range(plan.num_workers)]
        self._ready = [context.Queue() for _ in range(plan.num_workers)]
        self._slots: list[NDArray[np.uint8]] = []
        self._workers: list[BaseProcess] = []
        for worker in range(plan.num_workers):
            path = folder / f"slots-{worker}"
            shape = (SLOTS_A_WORKER, self._size)
            self._slots.append(np.memmap(path, dtype=np.uint8, mode="w+", shape=shape))
            for slot in range(SLOTS_A_WORKER):
                self._free[worker].put(slot)
            queues = (self._free[worker], self._ready[worker])
            args = (Maker(plan, weights), worker, first, path, *queues)
            self._workers.append(context.Process(target=_work, args=args, daemon=True))
        for process in self._workers:
            process.start()

    @property
    def slot_bytes(self) -> int:
        """The size of a slot."""
        return self._size

    @contextmanager
    def take(self) -> Iterator[tuple[Header, NDArray[np.uint8]]]:
        """The next batch, its header and bytes; the slot is free again at the end of the block.

        Raises RuntimeError with the worker's traceback when it failed or died.
        """
        worker = self._number % self.plan.num_workers
        number, slot, header = self._wait(worker)
        if slot < 0:
            raise RuntimeError(f"worker {worker} failed at batch {number}:\n{header}")
        assert number == self._number, (number, self._number)
        yield header, self._slots[worker][slot]
        self._number += 1
        self._free[worker].put(slot)

    def _wait(self, worker: int) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                return self._ready[worker].get(timeout=1.0)
            except queue.Empty:
                if not self._workers[worker].is_alive():
                    break
        code = self._workers[worker].exitcode
        raise RuntimeError(f"worker {worker}: no batch in {PATIENCE_S:.0f} s, exit code {code}")

    def close(self) -> None:
        """End the workers."""
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.join()


@contextmanager
def open_loader(plan: Plan, weights: Weights, first: int = 0) -> Iterator[Loader]:
    """A loader whose slots lie in memory where there is room, else in the temporary folder."""
    need = plan.num_workers * SLOTS_A_WORKER * slot_bytes(plan.batch_tokens, plan.max_item_tokens)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * need
    with tempfile.TemporaryDirectory(prefix="probe-", dir=memory if roomy else None) as folder:
        loader = Loader(plan, weights, Path(folder), first)
        try:
            yield loader
        finally:
            loader.close()


def make_fixed(
    source: Source, tasks: Sequence[str], split: Split, indices: Sequence[int], batch_tokens: int,
    num_workers: int,
) -> list[dict[str, NDArray[np.generic]]]:  # fmt: skip
    """The same items of every task, packed in batches of `batch_tokens`; made in parallel."""
    wanted = [(source, task, split, index) for index in indices for task in tasks]
    with mp.get_context("fork").Pool(num_workers) as pool:
        made = pool.starmap(_make_one, wanted, chunksize=8)
    batches, items, numbers, num_tokens = [], [], [], 0
    for place, item in enumerate(made):
        items.append(item)
        numbers.append(place % len(tasks))
        num_tokens += len(item.ids_T)
        if num_tokens >= batch_tokens or place == len(made) - 1:
            batches.append(pack(items, numbers))
            items, numbers, num_tokens = [], [], 0
    return batches


def _make_one(source: Source, task: str, split: Split, index: int) -> Encoded:
    return encode(source(task, split, index))
