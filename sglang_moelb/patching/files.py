"""Writing many files as one step, and the compiled copies beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sglang_moelb.patching.diff import PatchError

_PYC_HEADER_BYTES = 16
_PYC_HASH_BASED = 0b01
_PYC_CHECK_SOURCE = 0b10


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """New content for a file that may exist; with `mtime_ns` the modification time is set to it."""

    path: Path
    data: bytes
    mtime_ns: int | None = None


def replace_all(writes: Sequence[Write]) -> None:
    """Write every file, or none.

    New contents and backups are staged beside the files first, then renamed over them one by one
    (a rename also leaves hard links from a package cache alone). Modes are kept. PatchError, with
    every file as it was, when staging or renaming fails.
    """
    with ExitStack() as leftovers:
        replaced: list[tuple[Path, Path]] = []
        try:
            staged = [_stage(write, leftovers) for write in writes]
            for write, (new, backup) in zip(writes, staged, strict=True):
                new.replace(write.path)
                replaced.append((write.path, backup))
        except OSError as error:
            for path, backup in replaced:
                _restore(path, backup)
            raise PatchError(
                f"cannot write {error.filename}: {error.strerror}; nothing was changed. Run as the "
                "owner of that folder, or use an environment of your own"
            ) from error


def _stage(write: Write, leftovers: ExitStack) -> tuple[Path, Path]:
    new = write.path.with_name(f".moelb-new-{write.path.name}")
    backup = write.path.with_name(f".moelb-old-{write.path.name}")
    for temporary in (new, backup):
        leftovers.callback(temporary.unlink, missing_ok=True)
    with new.open("wb") as file:
        file.write(write.data)
        file.flush()
        os.fsync(file.fileno())
    if write.path.exists():
        shutil.copymode(write.path, new)
        shutil.copy2(write.path, backup)
    if write.mtime_ns is not None:
        os.utime(new, ns=(write.mtime_ns, write.mtime_ns))
    return new, backup


def _restore(path: Path, backup: Path) -> None:
    if backup.exists():
        backup.replace(path)
    else:
        path.unlink()


def compiled_copies(source: Path, *, timestamped: bool) -> tuple[Path, ...]:
    """The compiled copies that Python would run for `source` as it stands now.

    Those are hash-based ones marked unchecked, which Python never compares with the source, and, if
    asked for, `timestamped` ones that match it.
    """
    stat = source.stat()
    stamp = [int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF]
    copies: list[Path] = []
    for copy in sorted((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")):
        header = copy.read_bytes()[:_PYC_HEADER_BYTES]
        flags, *found = (int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12))
        is_hashed = bool(flags & _PYC_HASH_BASED)
        is_checked = bool(flags & _PYC_CHECK_SOURCE)
        if (is_hashed and not is_checked) or (timestamped and not is_hashed and found == stamp):
            copies.append(copy)
    return tuple(copies)


def remove(path: Path) -> None:
    """Remove a file that may be missing. PatchError when the folder does not allow it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PatchError(f"cannot remove {path}: {error.strerror}; remove it by hand") from error
