"""The patches that travel with the package: one folder an SGLang version, one file an intention.

A patch file is a header of `Field: one line` rows, an empty line, and a unified diff. The folder's
`series` file lists the patches in the order of application.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from sglang_moelb.patching.diff import FileChange, PatchError, apply_change, parse_changes

FIELDS = ("Description", "Why-not-a-hook", "Calls", "Upstream", "Remove-when")
# Present exactly when the diff removes lines, and says why it must.
REMOVED_LINES = "Removed-lines"
_FOLDER_PREFIX = "sglang-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One patch: `name` is its file name, `header` its fields in order, `text` the whole file."""

    name: str
    text: str
    header: dict[str, str]
    changes: tuple[FileChange, ...]

    @property
    def num_added(self) -> int:
        """Added lines over all files."""
        return sum(hunk.num_added for change in self.changes for hunk in change.hunks)

    @property
    def num_removed(self) -> int:
        """Removed lines over all files."""
        return sum(hunk.num_removed for change in self.changes for hunk in change.hunks)


def patches_root() -> Traversable:
    """The folder of the `sglang-<version>` folders, in a checkout and in a wheel alike."""
    return files("sglang_moelb.patching").joinpath("_patches")


def known_versions() -> tuple[str, ...]:
    """The SGLang versions there is a series for."""
    names = sorted(entry.name for entry in patches_root().iterdir())
    return tuple(
        name.removeprefix(_FOLDER_PREFIX) for name in names if name.startswith(_FOLDER_PREFIX)
    )


def load_series(version: str) -> tuple[Patch, ...]:
    """The patches for an SGLang version, in order. PatchError when there are none for it."""
    if version not in known_versions():
        raise PatchError(
            f"found sglang {version}, but the patches are for {' or '.join(known_versions())}: "
            f"install sglang=={known_versions()[-1]}, or use the plugin without patches"
        )
    folder = patches_root().joinpath(f"{_FOLDER_PREFIX}{version}")
    names = folder.joinpath("series").read_text(encoding="utf-8").splitlines()
    return tuple(
        parse_patch(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in names
    )


def parse_patch(name: str, text: str) -> Patch:
    """Read one patch file. PatchError when a header line or the diff is malformed.

    Which fields a header must have is not checked here: that is a rule for our tree, held by a
    test, and a patch recorded by an older release must stay readable.
    """
    head, separator, diff = text.partition("\n\n")
    if not separator:
        raise PatchError(f"{name}: no empty line between header and diff")
    header: dict[str, str] = {}
    for line in head.split("\n"):
        field, colon, value = line.partition(": ")
        if not colon or not value.strip() or field in header:
            raise PatchError(f"{name}: header line {line!r} is not 'Field: one line', once each")
        header[field] = value
    return Patch(name=name, text=text, header=header, changes=parse_changes(diff, name=name))


def touched_paths(patches: Sequence[Patch]) -> tuple[str, ...]:
    """Every file that the patches change, once, in the order of first change."""
    return tuple(dict.fromkeys(change.path for patch in patches for change in patch.changes))


def apply_patches(text: str, path: str, patches: Sequence[Patch]) -> str:
    """The text of file `path` after all patches. PatchError where one does not fit exactly."""
    for patch in patches:
        for change in patch.changes:
            if change.path == path:
                text = apply_change(text, change)
    return text


def reverse_patches(text: str, path: str, patches: Sequence[Patch]) -> str:
    """The text of file `path` before all patches. PatchError where one does not fit exactly."""
    for patch in reversed(patches):
        for change in reversed(patch.changes):
            if change.path == path:
                text = apply_change(text, change.reversed())
    return text
