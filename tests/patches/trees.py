"""Hashes of trees and files, computed without the code under test."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

VERSION = "0.5.23"


def tree_hash(root: Path) -> str:
    """One hash over every file below `root`: path, mode, modification time and content."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        time = stat.st_mtime_ns if path.is_file() else 0
        total.update(f"{path.relative_to(root)} {stat.st_mode:o} {time}\n".encode())
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


def record_hash(data: bytes) -> str:
    """A hash as RECORD files write it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
