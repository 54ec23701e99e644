"""Frames of a trace file: how bytes are delimited, checked, and told torn from damaged.

A file begins with 8 bytes of magic and the version of the format (uint32). A frame is a head of 13
bytes, little-endian: payload length (uint32), kind (uint8), CRC-32 of the payload, CRC-32 of the 9
bytes before it; then the payload. A frame that ends beyond the file is torn: its writer was killed,
or is still writing. A checksum that does not hold in what is there is damage.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from sglang_moelb.trace.types import TraceError

MAGIC = b"MOELBTR\n"
VERSION = 1
PREAMBLE = struct.Struct("<8sI")
HEAD = struct.Struct("<IBI")
CHECK = struct.Struct("<I")
HEAD_BYTES = HEAD.size + CHECK.size


class Kind(IntEnum):
    """What a payload is."""

    HEADER = 0
    PASS = 1
    CONFIG = 2
    TOKENS = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame; `start` is its place in the file, in bytes."""

    kind: int
    payload: bytes
    start: int

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.start + HEAD_BYTES + len(self.payload)


def preamble() -> bytes:
    """The first bytes of a file."""
    return PREAMBLE.pack(MAGIC, VERSION)


def frame(kind: Kind, payload: bytes) -> bytes:
    """`payload` with its head."""
    head = HEAD.pack(len(payload), kind, zlib.crc32(payload))
    return head + CHECK.pack(zlib.crc32(head)) + payload


def frames(path: Path, file: BinaryIO) -> Iterator[Frame]:
    """The whole frames of an open file, up to a torn one; the preamble is checked first.

    Raises `TraceError` for a file that is no trace, of a later version, or damaged.
    """
    if not _has_preamble(path, file.read(PREAMBLE.size)):
        return
    start = PREAMBLE.size
    while len(head := file.read(HEAD_BYTES)) == HEAD_BYTES:
        if CHECK.unpack_from(head, HEAD.size)[0] != zlib.crc32(head[: HEAD.size]):
            raise damaged(path, start, "the head of a frame")
        num_bytes, kind, checksum = HEAD.unpack_from(head)
        payload = file.read(num_bytes)
        if len(payload) < num_bytes:
            return
        if zlib.crc32(payload) != checksum:
            raise damaged(path, start, "the payload of a frame")
        whole = Frame(kind, payload, start)
        yield whole
        start = whole.end


def damaged(path: Path, start: int, what: str) -> TraceError:
    """The error for bytes that are not those that were written."""
    return TraceError(
        f"{path}: damaged at byte {start}: the checksum of {what} does not hold. Copy the file "
        f"again; to use the passes before it, cut a copy there (truncate -s {start} COPY)."
    )


def _has_preamble(path: Path, found: bytes) -> bool:
    """Whether the file has begun; one that was cut within its first bytes has not."""
    if preamble().startswith(found) and len(found) < PREAMBLE.size:
        return False
    if not found.startswith(MAGIC):
        raise TraceError(
            f"{path}: not a trace of sglang_moelb: it begins with {found[:8]!r}, a trace with "
            f"{MAGIC!r}. Give a folder or file written by --moelb-trace or moelb synthesise."
        )
    version = PREAMBLE.unpack(found)[1]
    if version != VERSION:
        raise TraceError(
            f"{path}: trace format {version}; this version of sglang_moelb reads {VERSION}. "
            "Install the version that wrote it."
        )
    return True
