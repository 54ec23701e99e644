"""Reads a trace: a folder or one file, finished, cut short or still being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sglang_moelb.config import Config, ConfigError, parse
from sglang_moelb.trace import codec
from sglang_moelb.trace.frames import Frame, Kind, frames
from sglang_moelb.trace.types import SCHEMA, Event, Header, TracedPass, TraceError

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A trace that was found to begin rightly; `files` are those of one rank, in order."""

    header: Header
    files: tuple[Path, ...]

    @property
    def config(self) -> Config:
        """The configuration at the first pass. Raises `TraceError`."""
        try:
            return parse(self.header.config, check_mode=False)
        except ConfigError as error:
            raise TraceError(f"{self.files[0]}: its configuration cannot be read: {error}") from (
                error
            )

    def events(self) -> Iterator[Event]:
        """Passes and changes of configuration in order, up to what was last written whole.

        Raises `TraceError` where a file is damaged or does not belong to the others.
        """
        for file, path in enumerate(self.files):
            end = 0
            for frame in _frames(path):
                end = frame.end
                if frame.kind == Kind.HEADER:
                    self._check(path, _decoded(path, frame, codec.decode_header), file)
                elif frame.kind == Kind.PASS:
                    yield _decoded(path, frame, self._pass)
                elif frame.kind == Kind.CONFIG:
                    yield _decoded(path, frame, codec.decode_config)
            if path != self.files[-1] and end < path.stat().st_size:
                raise TraceError(
                    f"{path}: cut short at byte {end}, though {self.files[file + 1].name} follows. "
                    "Copy it again."
                )

    def passes(self) -> Iterator[TracedPass]:
        """The passes alone."""
        return (event for event in self.events() if isinstance(event, TracedPass))

    def _pass(self, payload: bytes) -> TracedPass:
        return codec.decode_pass(payload, self.header.topology)

    def _check(self, path: Path, header: Header, file: int) -> None:
        if header.run != self.header.run or header.file != self.header.file + file:
            raise TraceError(
                f"{path}: not the file that follows those before it (another run, or one is "
                "missing). Keep the files of one server in a folder of their own, all of them."
            )


def open_trace(path: Path, rank: int | None = None) -> Trace:
    """The trace at `path`, of `rank` or else of the lowest rank there.

    Raises `TraceError` if there is none, or it is of another schema or a later version.
    """
    files = _files(path, rank)
    for first in files:
        frame = next(_frames(first), None)
        if frame is None:
            continue
        header = _decoded(first, frame, codec.decode_header)
        if header.schema != SCHEMA:
            raise TraceError(
                f"{first}: holds {header.schema!r}, not {SCHEMA!r}; it is not a trace of passes."
            )
        return Trace(header=header, files=tuple(files))
    raise TraceError(f"{path}: nothing traced yet. Wait for the server's first pass.")


def _files(path: Path, rank: int | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TraceError(f"{path}: no such file or folder. Give what --moelb-trace wrote.")
    found = sorted(path.glob("rank-*.trace"))
    ranks = sorted({name.name.split(".")[0] for name in found})
    if not ranks:
        raise TraceError(f"{path}: holds no *.trace file. Give what --moelb-trace wrote.")
    wanted = ranks[0] if rank is None else f"rank-{rank:03d}"
    if wanted not in ranks:
        raise TraceError(f"{path}: holds no trace of {wanted}; it has {', '.join(ranks)}.")
    return [name for name in found if name.name.split(".")[0] == wanted]


def _frames(path: Path) -> Iterator[Frame]:
    try:
        with path.open("rb") as file:
            yield from frames(path, file)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}).") from error


def _decoded(path: Path, frame: Frame, decode: Callable[[bytes], Made]) -> Made:
    try:
        return decode(frame.payload)
    except ValueError as error:
        raise TraceError(
            f"{path}: the frame at byte {frame.start} cannot be understood ({error}). It was "
            "written by another version of sglang_moelb; replay it with that one."
        ) from error
