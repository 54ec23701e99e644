"""A trace writer in a thread of its own: a slow disk delays neither serving nor the controller."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

from sglang_moelb.config import Config
from sglang_moelb.trace.types import TracedPass, TraceStats
from sglang_moelb.trace.writer import TraceWriter

MAX_PENDING = 64


class BackgroundWriter:
    """Takes passes without waiting; those that find the queue full are left out and counted.

    `add` and `reconfigure` are for one thread. A change of configuration is never left out.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._inbox: queue.Queue[TracedPass | Config | None] = queue.Queue()
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

    def add(self, traced: TracedPass) -> None:
        """Hand over one pass."""
        if self._writer.stopped:
            return
        if self._inbox.qsize() >= MAX_PENDING:
            self._num_missed += 1
            return
        self._inbox.put(replace(traced, num_missed=self._num_missed))
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
        self._writer.close()
