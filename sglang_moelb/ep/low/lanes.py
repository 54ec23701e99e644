"""The two queues of work of a rank: SGLang's stream, and one beside it for conversions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

Event = Any  # a point in one of the two queues; the host's queues are always empty


class Lanes(Protocol):
    """Main is the stream that is current; the side runs beside it. Nothing blocks the host."""

    def mark(self) -> Event:
        """The end of what the main lane holds."""

    def aside(self, after: tuple[Event, ...]) -> Any:
        """A context in which work goes to the side lane, behind the events `after`."""

    def mark_aside(self) -> Event:
        """The end of what the side lane holds."""

    def wait(self, event: Event) -> None:
        """Let the main lane wait for `event`."""


class StreamLanes:
    """Streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def mark(self) -> Event:
        """See `Lanes`."""
        return torch.cuda.current_stream().record_event()

    @contextmanager
    def aside(self, after: tuple[Event, ...]) -> Iterator[None]:
        """See `Lanes`."""
        for event in after:
            self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            yield

    def mark_aside(self) -> Event:
        """See `Lanes`."""
        return self._side.record_event()

    def wait(self, event: Event) -> None:
        """See `Lanes`."""
        torch.cuda.current_stream().wait_event(event)


class HostLanes:
    """The host, which does everything at once and in order."""

    def mark(self) -> Event:
        """See `Lanes`."""
        return None

    @contextmanager
    def aside(self, after: tuple[Event, ...]) -> Iterator[None]:
        """See `Lanes`."""
        yield

    def mark_aside(self) -> Event:
        """See `Lanes`."""
        return None

    def wait(self, event: Event) -> None:
        """See `Lanes`."""


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of `device`."""
    return StreamLanes(device) if device.type == "cuda" else HostLanes()
