"""Times of the parts of a pass without a host sync: events on CUDA, the host clock on CPU."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in time that may not have been reached yet."""

    def ms_until(self, later: Mark) -> float:
        """Milliseconds from this mark to `later`; both must have been reached."""
        ...

    def is_reached(self) -> bool:
        """Whether it has been reached; does not wait."""
        ...

    def give_back(self) -> None:
        """Let go of what the mark holds; it is not used any more."""
        ...


class HostMark:
    """A point on the host clock."""

    def __init__(self) -> None:
        self.s = time.perf_counter()

    def ms_until(self, later: HostMark) -> float:
        """Milliseconds between two host marks."""
        return (later.s - self.s) * 1e3

    def is_reached(self) -> bool:
        """Always: it was made when it was reached."""
        return True

    def give_back(self) -> None:
        """Nothing to give."""


_spare_events: list[torch.cuda.Event] = []  # to make one costs as much as to record it


class DeviceMark:
    """A point on a CUDA stream, the current one by default; readable once it has passed it."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.event = (
            _spare_events.pop() if _spare_events else torch.cuda.Event(enable_timing=True)
        )
        self.event.record(stream)

    def ms_until(self, later: DeviceMark) -> float:
        """Milliseconds between two device marks; the host must have waited for the later one."""
        return float(self.event.elapsed_time(later.event))

    def is_reached(self) -> bool:
        """Whether the stream has passed the mark; does not wait."""
        return bool(self.event.query())

    def give_back(self) -> None:
        """Let another mark have the event; this one is not used any more."""
        _spare_events.append(self.event)


def mark_on(
    device: torch.device, stream: torch.cuda.Stream | None = None
) -> HostMark | DeviceMark:
    """Mark now on the clock of `device`, on CUDA in `stream` or else the current one.

    To ask for the current stream takes as long as the mark: who makes many asks once.
    """
    return DeviceMark(stream) if device.type == "cuda" else HostMark()


def stream_on(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of `device`, None where it has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
