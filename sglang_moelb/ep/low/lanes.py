"""The two queues of work of a rank: SGLang's stream, and one beside it for conversions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


class _Aside:
    """Work goes to `side`; `torch.cuda.stream` also asks for devices, which here are the same."""

    __slots__ = ("_main", "_side")

    def __init__(self, side: torch.cuda.Stream) -> None:
        self._side = side

    def __enter__(self) -> None:
        self._main = torch.cuda.current_stream()
        torch.cuda.set_stream(self._side)

    def __exit__(self, *raised: object) -> None:
        torch.cuda.set_stream(self._main)


class StreamLanes:
    """Streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def mark(self) -> Event:
        """See `Lanes`."""
        return torch.cuda.current_stream().record_event()

    def aside(self, after: tuple[Event, ...]) -> AbstractContextManager[None]:
        """See `Lanes`."""
        for event in after:
            self._side.wait_event(event)
        return _Aside(self._side)

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

    def aside(self, after: tuple[Event, ...]) -> AbstractContextManager[None]:
        """See `Lanes`."""
        return nullcontext()

    def mark_aside(self) -> Event:
        """See `Lanes`."""
        return None

    def wait(self, event: Event) -> None:
        """See `Lanes`."""


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of `device`."""
    return StreamLanes(device) if device.type == "cuda" else HostLanes()
