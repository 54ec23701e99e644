"""Unified diffs, read and applied strictly: no fuzz, no offset, one newline convention.

Ours, not a library's: the parsers on PyPI tolerate what has to be an error here (a hunk that fits
elsewhere, a wrong count), and a strict reader is shorter than the checks around a lenient one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(ValueError):
    """Something about a patch, a series or an installation is not as expected; says the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hunk:
    """One hunk: the lines `old` at `old_start` (counted from 1) become `new` at `new_start`."""

    old_start: int
    old: tuple[str, ...]
    new_start: int
    new: tuple[str, ...]
    num_added: int
    num_removed: int

    def reversed(self) -> Hunk:
        """The hunk that undoes this one."""
        return Hunk(
            old_start=self.new_start,
            old=self.new,
            new_start=self.old_start,
            new=self.old,
            num_added=self.num_removed,
            num_removed=self.num_added,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """All hunks of one file; `path` is relative to the folder that holds the package."""

    path: str
    hunks: tuple[Hunk, ...]

    def reversed(self) -> FileChange:
        """The change that undoes this one."""
        return FileChange(path=self.path, hunks=tuple(hunk.reversed() for hunk in self.hunks))


def parse_changes(text: str, *, name: str) -> tuple[FileChange, ...]:
    """Read the file changes of a patch.

    `text` starts at the first `--- a/` line. `name` is the patch's, for messages.
    Raises PatchError on anything but plain modifications of existing files.
    """
    if not text.endswith("\n"):
        raise PatchError(f"{name}: the last line has no newline; add one")
    lines = text.split("\n")[:-1]
    changes: list[FileChange] = []
    at = 0
    while at < len(lines):
        path = _read_path(lines[at : at + 2], name=name)
        at += 2
        hunks: list[Hunk] = []
        while at < len(lines) and lines[at].startswith("@@ "):
            hunk, at = _read_hunk(lines, at, name=name)
            hunks.append(hunk)
        if not hunks:
            raise PatchError(f"{name}: {path} has no hunk; leave the file out of the patch")
        changes.append(FileChange(path=path, hunks=tuple(hunks)))
    return tuple(changes)


def _read_path(pair: Sequence[str], *, name: str) -> str:
    old, new = pair if len(pair) == 2 else ("", "")
    path = old.removeprefix("--- a/")
    if path == old or new != f"+++ b/{path}" or path.startswith("/") or ".." in path.split("/"):
        raise PatchError(f"{name}: expected '--- a/FILE' and '+++ b/FILE', found {list(pair)}")
    return path


def _read_hunk(lines: Sequence[str], at: int, *, name: str) -> tuple[Hunk, int]:
    match = _HUNK.match(lines[at])
    if match is None:
        raise PatchError(f"{name}: line {lines[at]!r} is not a hunk header")
    old_start, num_old, new_start, num_new = (int(group or 1) for group in match.groups())
    old: list[str] = []
    new: list[str] = []
    num_added = num_removed = 0
    at += 1
    while len(old) < num_old or len(new) < num_new:
        mark, content = (lines[at][:1], lines[at][1:]) if at < len(lines) else ("end of file", "")
        if mark not in (" ", "-", "+"):
            raise PatchError(f"{name}: hunk {match[0]!r} has {mark!r} where ' ', '-' or '+' stands")
        if mark != "+":
            old.append(content)
        if mark != "-":
            new.append(content)
        num_added += mark == "+"
        num_removed += mark == "-"
        at += 1
    if (len(old), len(new)) != (num_old, num_new):
        raise PatchError(f"{name}: hunk {match[0]!r} has other line counts than it says")
    hunk = Hunk(
        old_start=old_start,
        old=tuple(old),
        new_start=new_start,
        new=tuple(new),
        num_added=num_added,
        num_removed=num_removed,
    )
    return hunk, at


def apply_change(text: str, change: FileChange) -> str:
    """The text after the change. Each hunk must fit exactly at its line, else PatchError.

    Example: a change whose hunk turns line 2, `b`, into `c` makes "a\\nc\\n" of "a\\nb\\n".
    """
    lines = text.split("\n")
    result: list[str] = []
    taken = 0
    for hunk in change.hunks:
        first = hunk.old_start - 1
        result += lines[taken:first]
        if len(result) != hunk.new_start - 1:
            where = f"{change.path}: hunk at line {hunk.old_start}"
            raise PatchError(f"{where} says it ends up at line {hunk.new_start}: it cannot")
        found = lines[first : first + len(hunk.old)]
        if found != list(hunk.old):
            raise PatchError(_first_difference(change.path, hunk, found))
        result += hunk.new
        taken = first + len(hunk.old)
    return "\n".join(result + lines[taken:])


def _first_difference(path: str, hunk: Hunk, found: Sequence[str]) -> str:
    pairs = zip_longest(found, hunk.old)
    index, (line, expected) = next(item for item in enumerate(pairs) if item[1][0] != item[1][1])
    return f"{path}: line {hunk.old_start + index} is {line!r}, the patch needs {expected!r}"
