"""The nouns of a trace.

Shape letters: L MoE layers, R source ranks, E logical experts, M modalities (text, vision).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sglang_moelb.config import Config
from sglang_moelb.types import Decision, IntArray, StepRecord, Topology

SCHEMA = "sglang_moelb.passes"


class TraceError(ValueError):
    """A trace cannot be written or read; the message names the file and the fix."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all passes of a file.

    `run` tells the files of one writer from those of another; `file` counts them from 0; `config`
    is the configuration at the file's first pass, as plain JSON types; `source` says what made the
    passes ("live", or how they were synthesised).
    """

    schema: str = SCHEMA
    num_layers: int
    num_experts: int
    num_ranks: int
    topk: int
    rank: int
    run: str
    source: str
    file: int = 0
    config: dict[str, Any] = {}

    @property
    def topology(self) -> Topology:
        """The sizes of the model and of the EP group."""
        return Topology(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            topk=self.topk,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceStats:
    """How far a writer is: what is on its way to the disk, and what was left out."""

    state: Literal["off", "running", "stopped"]
    num_bytes: int = 0
    num_passes: int = 0
    num_missed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedPass:
    """One pass: the record that the controller saw, and its rows by the rank they came from.

    `record.rows_LEM` is the sum of `rows_LREM` over source ranks; `now_s` is the time that the
    controller was told, `decision` what it decided (None where the rank has no controller), and
    `num_missed` how many passes just before this one could not be written.
    """

    record: StepRecord
    rows_LREM: IntArray
    now_s: float
    decision: Decision | None = None
    num_missed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigChange:
    """The configuration was changed between two passes."""

    config: Config


Event = TracedPass | ConfigChange
