"""A trace writer in a thread of its own: a slow disk delays neither serving nor the controller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from sglang_moelb.config import Config
from sglang_moelb.trace.types import PendingTokens, TracedPass, TraceStats

MAX_PENDING = 64


class PassWriter(Protocol):
    """What writes, in the thread: a `TraceWriter` or a `TokenWriter`."""

    stopped: str
    num_bytes: int
    num_passes: int

    def add(self, item: Any, /) -> None:
        """Append one pass of the kind that this writer takes."""
        ...

    def reconfigure(self, config: Config) -> None:
        """Append a change of configuration."""
        ...

    def close(self) -> None:
        """End the trace."""
        ...


class BackgroundWriter:
    """Takes passes without waiting; those that find the queue full are left out and counted.

    `add` and `reconfigure` are for one thread. A change of configuration is never left out.
    """

    def __init__(self, writer: PassWriter, max_pending: int = MAX_PENDING) -> None:
        self._writer = writer
        self._max_pending = max_pending
        self.on_written: Callable[[], None] = lambda: None  # called in the thread, item by item
        self._inbox: queue.Queue[TracedPass | PendingTokens | Config | None] = queue.Queue()
        self._num_missed = 0
        self._num_missed_before = 0
        self._thread = threading.Thread(target=self._run, name="moelb-trace", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> str:
        """Why nothing is written any more, or ""."""
        return self._writer.stopped or ("" if self._thread.is_alive() else "its thread is dead")

    @property
    def stats(self) -> TraceStats:
        """What has been written, and how many passes were left out."""
        return TraceStats(
            state="stopped" if self.stopped else "running",
            num_bytes=self._writer.num_bytes,
            num_passes=self._writer.num_passes,
            num_missed=self._num_missed_before + self._num_missed,
        )

    def has_room(self) -> bool:
        """Whether a pass would be taken; one that would not be is counted as missed."""
        if self._writer.stopped:
            return False
        if self._inbox.qsize() >= self._max_pending:
            self._num_missed += 1
            return False
        return True

    def add(self, item: TracedPass | PendingTokens) -> None:
        """Hand over one pass."""
        if not self.has_room():
            return
        self._inbox.put(replace(item, num_missed=self._num_missed))
        self._num_missed_before += self._num_missed
        self._num_missed = 0

    def reconfigure(self, config: Config) -> None:
        """Hand over a change of configuration."""
        self._inbox.put(config)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what was handed over and end the thread; waits at most `timeout_s`."""
        self._inbox.put(None)
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            if isinstance(item, Config):
                self._writer.reconfigure(item)
            else:
                self._writer.add(item)
            self.on_written()
        self._writer.close()
