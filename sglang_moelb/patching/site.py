"""One installed SGLang: where it lies, its version, and the hashes its wheel recorded."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from importlib.util import find_spec
from pathlib import Path

import msgspec

from sglang_moelb.patching.diff import PatchError

MANIFEST_NAME = ".moelb-patched.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A folder that holds `sglang/` and its `.dist-info`; `hashes` maps file paths below it to the
    SHA-256 that the wheel's RECORD gives, in RECORD's own encoding."""

    root: Path
    version: str
    hashes: Mapping[str, str]

    @property
    def manifest_path(self) -> Path:
        """Where the record of an application lies."""
        return self.root / "sglang" / MANIFEST_NAME


class PatchedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A patched file: path below the site, hashes as RECORD has them, modification time before."""

    path: str
    sha256_before: str
    sha256_after: str
    mtime_before_ns: int


class AppliedPatch(msgspec.Struct, frozen=True, kw_only=True):
    """A patch as it was applied. The text is kept, so that a later release can still undo it."""

    name: str
    text: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `apply` wrote beside the patched package."""

    sglang_version: str
    patches: tuple[AppliedPatch, ...]
    files: tuple[PatchedFile, ...]


def digest(data: bytes) -> str:
    """SHA-256 as RECORD files write it: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def default_root() -> Path:
    """The folder from which this interpreter would import sglang, found without importing it."""
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError(
            f"sglang is not installed for {sys.executable}: install it, or name the folder that "
            "holds it with --site"
        )
    return Path(spec.submodule_search_locations[0]).parent


def open_site(root: Path | None = None) -> Site:
    """The installation under `root`, by default the running interpreter's.

    PatchError when there is none, when it did not come from a wheel, or when two versions lie in
    that folder.
    """
    root = default_root() if root is None else root
    if not (root / "sglang" / "__init__.py").is_file():
        raise PatchError(f"--site {root}: no sglang in it; name the folder that holds sglang/")
    infos = sorted(root.glob("sglang-*.dist-info"))
    if not infos:
        raise PatchError(
            f"no sglang-*.dist-info beside {root / 'sglang'}: a source or editable tree cannot be "
            "compared with a wheel; install the wheel, or apply the patches with git there"
        )
    if len(infos) > 1:
        names = " and ".join(info.name for info in infos)
        raise PatchError(f"{root} holds {names}: remove the one that is not installed")
    distribution = PathDistribution(infos[0])
    hashes = {
        str(file): file.hash.value
        for file in distribution.files or []
        if file.hash is not None and file.hash.mode == "sha256"
    }
    if not hashes:
        raise PatchError(f"{infos[0]} has no RECORD with hashes: install the wheel with pip or uv")
    return Site(root=root, version=distribution.version, hashes=hashes)


def read_manifest(site: Site) -> Manifest | None:
    """The record of an application to this version, or None. PatchError when it cannot be read."""
    if not site.manifest_path.exists():
        return None
    try:
        manifest = msgspec.json.decode(site.manifest_path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise PatchError(
            f"{site.manifest_path} is not a manifest of ours ({error}): remove it and ask again"
        ) from error
    return manifest if manifest.sglang_version == site.version else None


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as readable JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
