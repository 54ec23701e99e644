"""What may be done to an installation, and doing it.

Every decision compares content with two known forms, the wheel's (RECORD) and the patched one; a
file in neither form was changed by someone else and is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sglang_moelb.patching.diff import PatchError
from sglang_moelb.patching.files import Write, compiled_copies, remove, replace_all
from sglang_moelb.patching.series import (
    Patch,
    apply_patches,
    load_series,
    parse_patch,
    reverse_patches,
    touched_paths,
)
from sglang_moelb.patching.site import (
    AppliedPatch,
    Manifest,
    PatchedFile,
    Site,
    digest,
    encode_manifest,
    open_site,
    read_manifest,
)


class FileState(StrEnum):
    """In which form a file stands."""

    PRISTINE = "pristine"
    PATCHED = "patched"
    MODIFIED = "modified"
    MISSING = "missing"


class State(StrEnum):
    """In which form an installation stands."""

    PRISTINE = "pristine"
    APPLIED = "applied"
    OUTDATED = "outdated"
    HALF_APPLIED = "half-applied"
    MODIFIED = "modified"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchStatus:
    """One look at an installation; `files` has paths below `site`, `patches` are those on offer."""

    site: Path
    version: str
    state: State
    patches: tuple[str, ...]
    files: dict[str, FileState]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: str
    state: FileState
    pristine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    site: Site
    state: State
    series: tuple[Patch, ...]
    manifest: Manifest | None
    files: tuple[_File, ...]

    def named(self, *states: FileState) -> str:
        return ", ".join(file.path for file in self.files if file.state in states)


def status(site: Path | None = None) -> PatchStatus:
    """In which form the installation under `site` stands, by default the running interpreter's.

    Host only, changes nothing. PatchError when there is no installation or no series for it.
    """
    look = _look(open_site(site))
    return PatchStatus(
        site=look.site.root,
        version=look.site.version,
        state=look.state,
        patches=tuple(patch.name for patch in look.series),
        files={file.path: file.state for file in look.files},
    )


def apply(site: Path | None = None) -> PatchStatus:
    """Apply the series to a pristine installation; an applied one is left as it is.

    All files are checked before the first is written. PatchError, with nothing changed, for another
    version, a modified or missing file, a half-applied tree, another set of patches, or a folder
    that cannot be written.
    """
    look = _look(open_site(site))
    _refuse_modified(look)
    if look.state is State.HALF_APPLIED:
        raise PatchError(
            f"{look.site.root} is half-applied, patched in {look.named(FileState.PATCHED)}: "
            "run `moelb patch revert` first, then apply"
        )
    if look.state is State.OUTDATED:
        raise PatchError(
            f"{look.site.root} carries another set of patches: run `moelb patch revert`, then apply"
        )
    if look.state is State.PRISTINE:
        _write_patched(look)
    return status(site)


def revert(site: Path | None = None) -> PatchStatus:
    """Restore the wheel's files, modification times included; a pristine tree is left as it is.

    Also completes a half-applied tree's way back, since each file is compared with the wheel's hash
    before anything is written. PatchError, with nothing changed, as for `apply`.
    """
    look = _look(open_site(site))
    _refuse_modified(look)
    _write_pristine(look)
    return status(site)


def _look(site: Site) -> _Look:
    series = load_series(site.version)
    manifest = read_manifest(site)
    on_disk = series
    if manifest is not None:
        on_disk = tuple(parse_patch(patch.name, patch.text) for patch in manifest.patches)
    paths = dict.fromkeys((*touched_paths(on_disk), *touched_paths(series)))
    files = tuple(_look_at(site, path, on_disk) for path in paths)
    patched_paths = set(touched_paths(on_disk))
    states = {file.state for file in files if file.path in patched_paths}
    if {file.state for file in files} & {FileState.MODIFIED, FileState.MISSING}:
        state = State.MODIFIED
    elif states == {FileState.PRISTINE}:
        state = State.PRISTINE
    elif manifest is None or len(states) > 1:
        state = State.HALF_APPLIED
    elif [patch.text for patch in on_disk] != [patch.text for patch in series]:
        state = State.OUTDATED
    else:
        state = State.APPLIED
    return _Look(site=site, state=state, series=series, manifest=manifest, files=files)


def _look_at(site: Site, path: str, on_disk: Sequence[Patch]) -> _File:
    if not (site.root / path).is_file():
        return _File(path=path, state=FileState.MISSING)
    data = (site.root / path).read_bytes()
    try:
        text = data.decode()
        if digest(data) == site.hashes.get(path):
            return _File(path=path, state=FileState.PRISTINE, pristine=text)
        pristine = reverse_patches(text, path, on_disk)
    except (PatchError, UnicodeDecodeError):
        return _File(path=path, state=FileState.MODIFIED)
    if digest(pristine.encode()) != site.hashes.get(path):
        return _File(path=path, state=FileState.MODIFIED)
    return _File(path=path, state=FileState.PATCHED, pristine=pristine)


def _refuse_modified(look: _Look) -> None:
    if look.state is State.MODIFIED:
        names = look.named(FileState.MODIFIED, FileState.MISSING)
        version = look.site.version
        raise PatchError(
            f"{look.site.root}: {names} is neither as the wheel of sglang {version} has it nor as "
            "our patches make it: restore it with "
            f"`pip install --force-reinstall --no-deps sglang=={version}`"
        )


def _write_patched(look: _Look) -> None:
    writes: list[Write] = []
    records: list[PatchedFile] = []
    for file in look.files:
        path = look.site.root / file.path
        data = apply_patches(file.pristine, file.path, look.series).encode()
        writes.append(Write(path=path, data=data))
        record = PatchedFile(
            path=file.path,
            sha256_before=look.site.hashes[file.path],
            sha256_after=digest(data),
            mtime_before_ns=path.stat().st_mtime_ns,
        )
        records.append(record)
    manifest = Manifest(
        sglang_version=look.site.version,
        patches=tuple(AppliedPatch(name=patch.name, text=patch.text) for patch in look.series),
        files=tuple(records),
    )
    replace_all([*writes, Write(path=look.site.manifest_path, data=encode_manifest(manifest))])
    # Timestamped copies of the wheel's source stay: Python sees that they are old, and a revert
    # makes them valid again.
    for write in writes:
        for copy in compiled_copies(write.path, timestamped=False):
            remove(copy)


def _write_pristine(look: _Look) -> None:
    files = look.manifest.files if look.manifest is not None else ()
    mtimes_ns = {file.path: file.mtime_before_ns for file in files}
    writes = [
        Write(
            path=look.site.root / file.path,
            data=file.pristine.encode(),
            mtime_ns=mtimes_ns.get(file.path),
        )
        for file in look.files
        if file.state is FileState.PATCHED
    ]
    compiled = [copy for write in writes for copy in compiled_copies(write.path, timestamped=True)]
    replace_all(writes)
    for copy in compiled:
        remove(copy)
    remove(look.site.manifest_path)
