"""Reads a trace of passes: a folder or one file, finished, cut short or still being written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_moelb.trace import codec
from sglang_moelb.trace.files import TraceFiles, decoded, open_files
from sglang_moelb.trace.frames import Kind
from sglang_moelb.trace.types import PASSES, Event, TracedPass


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace(TraceFiles):
    """A trace of passes that was found to begin rightly."""

    def events(self) -> Iterator[Event]:
        """Passes and changes of configuration in order, up to what was last written whole.

        Raises `TraceError` where a file is damaged or does not belong to the others.
        """
        for path, frame in self.frames():
            if frame.kind == Kind.PASS:
                yield decoded(path, frame, self._pass)
            elif frame.kind == Kind.CONFIG:
                yield decoded(path, frame, codec.decode_config)

    def passes(self) -> Iterator[TracedPass]:
        """The passes alone."""
        return (event for event in self.events() if isinstance(event, TracedPass))

    def _pass(self, payload: bytes) -> TracedPass:
        return codec.decode_pass(payload, self.header.topology)


def open_trace(path: Path, rank: int | None = None) -> Trace:
    """The trace at `path`, of `rank` or else of the lowest rank there.

    Raises `TraceError` if there is none, or it is of another schema or a later version.
    """
    header, files = open_files(path, PASSES, rank)
    return Trace(header=header, files=files)
