"""Writes a rank's trace: whole frames, unbuffered, rotated by size.

What was handed to the operating system survives a kill -9 of the process. Nothing here runs on the
hot path, and nothing here may stop serving: a disk that fails stops the trace, once and aloud.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from io import FileIO
from pathlib import Path

import msgspec

from sglang_moelb.config import Config
from sglang_moelb.trace import codec, frames
from sglang_moelb.trace.frames import Kind
from sglang_moelb.trace.types import PASSES, Contents, Header, TracedPass, TraceError
from sglang_moelb.types import Topology

logger = logging.getLogger("sglang_moelb")

MAX_FILE_BYTES = 256 << 20


class FrameWriter:
    """Appends frames to one rank's files; not thread-safe.

    Raises `TraceError` at the start if the folder cannot be written or has such a trace of this
    rank already, and never after: `stopped` then says why nothing is written any more. `num_bytes`
    and `num_passes` are what all files of this writer hold.
    """

    def __init__(
        self,
        folder: Path,
        *,
        contents: Contents,
        topology: Topology,
        rank: int,
        config: Config,
        source: str = "live",
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._contents = contents
        self.header = Header(
            schema=contents.schema,
            num_layers=topology.num_layers,
            num_experts=topology.num_experts,
            num_ranks=topology.num_ranks,
            topk=topology.topk,
            rank=rank,
            run=uuid.uuid4().hex,
            source=source,
            config=msgspec.to_builtins(config),
        )
        self._max_file_bytes = max_file_bytes
        self.stopped = ""
        self.num_bytes = 0
        self.num_passes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.glob(contents.pattern(rank))):
                raise FileExistsError
            self._file, self._file_bytes = self._begin()
        except FileExistsError as error:
            raise TraceError(
                f"trace folder {folder}: holds a trace of rank {rank} already, perhaps of a "
                "server that still runs. Give each server a folder of its own."
            ) from error
        except OSError as error:
            raise TraceError(
                f"trace folder {folder}: cannot be written ({error.strerror}). Give a folder "
                "that this user may write to, on a disk with room."
            ) from error

    def append(self, kind: Kind, payload: bytes) -> bool:
        """Append one frame; returns whether it was written."""
        if self.stopped:
            return False
        data = frames.frame(kind, payload)
        try:
            if self._file_bytes + len(data) > self._max_file_bytes:
                self._rotate()
            num_bytes = _write(self._file, data)
        except OSError as error:
            # What has been written of the frame is taken back, else it is a torn one.
            with contextlib.suppress(OSError):
                self._file.truncate(self._file_bytes)
            self.give_up(str(error.strerror))
            return False
        self._file_bytes += num_bytes
        self.num_bytes += num_bytes
        return True

    def reconfigure(self, config: Config) -> None:
        """Append a change of configuration."""
        self.header = msgspec.structs.replace(self.header, config=msgspec.to_builtins(config))
        self.append(Kind.CONFIG, codec.encode_config(config))

    def give_up(self, why: str) -> None:
        """Stop for good, and tell."""
        self._stop(f"{self._folder}: {why}")
        logger.error("trace stopped, serving goes on: %s", self.stopped)

    def close(self) -> None:
        """End the trace; what was added is on its way to the disk."""
        if not self.stopped:
            self._stop("closed")

    def _begin(self) -> tuple[FileIO, int]:
        """A new file with its header, and its length; what is there already is left as it is."""
        path = self._folder / self._contents.file_name(self.header.rank, self.header.file)
        header = frames.frame(Kind.HEADER, codec.encode_header(self.header))
        file = FileIO(path, "xb")
        num_bytes = _write(file, frames.preamble() + header)
        self.num_bytes += num_bytes
        return file, num_bytes

    def _rotate(self) -> None:
        full = self._file
        self.header = msgspec.structs.replace(self.header, file=self.header.file + 1)
        self._file, self._file_bytes = self._begin()
        full.close()

    def _stop(self, why: str) -> None:
        self.stopped = why
        with contextlib.suppress(OSError):
            self._file.close()


class TraceWriter(FrameWriter):
    """Appends passes; see `FrameWriter`."""

    def __init__(
        self,
        folder: Path,
        *,
        topology: Topology,
        rank: int,
        config: Config,
        source: str = "live",
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        super().__init__(
            folder,
            contents=PASSES,
            topology=topology,
            rank=rank,
            config=config,
            source=source,
            max_file_bytes=max_file_bytes,
        )

    def add(self, traced: TracedPass) -> None:
        """Append one pass; does nothing once the trace has stopped."""
        if self.stopped:
            return
        try:
            payload = codec.encode_pass(traced, self.header.topology)
        except ValueError as error:
            self.give_up(str(error))
        else:
            self.num_passes += self.append(Kind.PASS, payload)


def _write(file: FileIO, data: bytes) -> int:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    return len(data)
