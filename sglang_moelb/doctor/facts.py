"""What the doctor finds and what it says about it.

Shape letters: G GPUs of this host, in the order of nvidia-smi.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One distribution. `expected` is SGLang's own pin or ours ("": any), `found` "" if absent."""

    label: str
    distribution: str
    expected: str
    found: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeamFact:
    """One row of the seam table against the installed source; `problem` is "" where it holds."""

    name: str
    form: str
    problem: str
    expected: str
    found: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchFact:
    """State of the patch set by `moelb patch status`, or why it cannot be told."""

    state: str
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginFact:
    """One entry point of ours and whether SGLang would load it."""

    name: str
    found: bool
    allowed: bool
    platform_allows: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU; `capability` is (major, minor), memory in MiB."""

    name: str
    capability: tuple[int, int]
    memory_mib: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """How GPUs reach each other: `kind_GG` as nvidia-smi names it ("NV18", "SYS", "X" for itself),
    `peer_GG` whether one may read the other's memory. Empty where it cannot be told."""

    kind_GG: tuple[tuple[str, ...], ...] = ()
    peer_GG: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything the judgement is made from."""

    system: str
    python: tuple[int, int, int]
    num_cores: int
    memory_mib: int
    packages: tuple[Package, ...]
    missing_extras: tuple[str, ...]
    seams: tuple[SeamFact, ...]
    patch: PatchFact
    plugins: tuple[PluginFact, ...]
    sglang_plugins: str
    sglang_platform: str
    driver: str
    gpus: tuple[Gpu, ...]
    links: Links

    def package(self, label: str) -> Package:
        """The package of that label."""
        return next(p for p in self.packages if p.label == label)


class Mark(StrEnum):
    """How a row stands: works, does not, or is absent without being needed here."""

    OK = "ok"
    NO = "no"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table; `fix` is a command or a sentence, "" where nothing is to be done."""

    section: str
    what: str
    mark: Mark
    found: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All rows, and whether a server with the plugin can run here."""

    rows: tuple[Row, ...]
    can_run: bool
