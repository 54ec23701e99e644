"""The files of a trace: found, opened and read frame by frame, whatever their frames hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sglang_moelb.config import Config, ConfigError, parse
from sglang_moelb.trace import codec
from sglang_moelb.trace.frames import Frame, Kind, frames
from sglang_moelb.trace.types import Contents, Header, TraceError

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFiles:
    """A trace that was found to begin rightly; `files` are those of one rank, in order."""

    header: Header
    files: tuple[Path, ...]

    @property
    def config(self) -> Config:
        """The configuration at the first pass. Raises `TraceError`."""
        try:
            return parse(self.header.config)
        except ConfigError as error:
            raise TraceError(f"{self.files[0]}: its configuration cannot be read: {error}") from (
                error
            )

    def frames(self) -> Iterator[tuple[Path, Frame]]:
        """Frames but for the headers, in order, up to what was last written whole.

        Raises `TraceError` where a file is damaged or does not belong to the others.
        """
        for file, path in enumerate(self.files):
            end = 0
            for frame in _frames(path):
                end = frame.end
                if frame.kind == Kind.HEADER:
                    self._check(path, decoded(path, frame, codec.decode_header), file)
                else:
                    yield path, frame
            if path != self.files[-1] and end < path.stat().st_size:
                raise TraceError(
                    f"{path}: cut short at byte {end}, though {self.files[file + 1].name} follows. "
                    "Copy it again."
                )

    def _check(self, path: Path, header: Header, file: int) -> None:
        if header.run != self.header.run or header.file != self.header.file + file:
            raise TraceError(
                f"{path}: not the file that follows those before it (another run, or one is "
                "missing). Keep the files of one server in a folder of their own, all of them."
            )


def open_files(
    path: Path, contents: Contents, rank: int | None
) -> tuple[Header, tuple[Path, ...]]:
    """The header and the files of the trace at `path`, of `rank` or else of the lowest rank there.

    Raises `TraceError` if there is none, or it is of another schema or a later version.
    """
    files = _find(path, contents, rank)
    for first in files:
        frame = next(_frames(first), None)
        if frame is None:
            continue
        header = decoded(first, frame, codec.decode_header)
        if header.schema != contents.schema:
            raise TraceError(
                f"{first}: holds {header.schema!r}, not {contents.schema!r}; it is not a trace of "
                f"{contents.what}."
            )
        return header, tuple(files)
    raise TraceError(f"{path}: nothing traced yet. Wait for the server's first pass.")


def decoded(path: Path, frame: Frame, decode: Callable[[bytes], Made]) -> Made:
    """A frame's payload, decoded. Raises `TraceError` where it does not make sense."""
    try:
        return decode(frame.payload)
    except ValueError as error:
        raise TraceError(
            f"{path}: the frame at byte {frame.start} cannot be understood ({error}). It was "
            "written by another version of sglang_moelb; replay it with that one."
        ) from error


def _find(path: Path, contents: Contents, rank: int | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TraceError(f"{path}: no such file or folder. Give what --moelb-trace wrote.")
    found = sorted(path.glob(contents.pattern()))
    ranks = sorted({name.name.split(".")[0] for name in found})
    if not ranks:
        raise TraceError(
            f"{path}: holds no {contents.pattern()} file. Give what --moelb-trace wrote."
        )
    wanted = ranks[0] if rank is None else contents.rank_name(rank)
    if wanted not in ranks:
        raise TraceError(f"{path}: holds no trace of {wanted}; it has {', '.join(ranks)}.")
    return [name for name in found if name.name.split(".")[0] == wanted]


def _frames(path: Path) -> Iterator[Frame]:
    try:
        with path.open("rb") as file:
            yield from frames(path, file)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}).") from error
