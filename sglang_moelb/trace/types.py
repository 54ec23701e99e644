"""The nouns of a trace.

Shape letters: L MoE layers, R source ranks, E logical experts, M modalities (text, vision), T rows
of one rank, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_moelb.config import Config
from sglang_moelb.types import Decision, IntArray, StepRecord, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a trace holds: the schema in its header, and how its files begin."""

    schema: str
    prefix: str
    what: str

    def rank_name(self, rank: int) -> str:
        """How the names of a rank's files begin."""
        return f"{self.prefix}-{rank:03d}"

    def file_name(self, rank: int, file: int) -> str:
        """The name of a rank's file number `file`."""
        return f"{self.rank_name(rank)}.{file:05d}.trace"

    def pattern(self, rank: int | None = None) -> str:
        """A glob pattern for the files of one rank, or of all."""
        return f"{self.prefix}-*.trace" if rank is None else f"{self.rank_name(rank)}.*.trace"


PASSES = Contents(schema="sglang_moelb.passes", prefix="rank", what="passes")
TOKENS = Contents(schema="sglang_moelb.tokens", prefix="tokens", what="tokens")


class TraceError(ValueError):
    """A trace cannot be written or read; the message names the file and the fix."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all passes of a file.

    `run` tells the files of one writer from those of another; `file` counts them from 0; `config`
    is the configuration at the file's first pass, as plain JSON types; `source` says what made the
    passes ("live", or how they were synthesised).
    """

    schema: str = PASSES.schema
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
class TokenPass:
    """The routing of every row of one rank in one pass, as its routers gave it, before any lever.

    `step` is the pass's number in the trace of passes too; `lever` the name of the lever that acted
    on these rows afterwards. An id of -1 is no expert: padding. Weights are rounded to float16.
    """

    step: int
    lever: str
    ids_LTK: NDArray[np.int16]
    weights_LTK: NDArray[np.float16]
    is_vision_T: NDArray[np.bool_]
    is_protected_T: NDArray[np.bool_]
    num_missed: int = 0

    def rows_LEM(self, num_experts: int) -> IntArray:
        """Rows by expert and modality, which all ranks' token passes add up to in a record."""
        num_layers = len(self.ids_LTK)
        rows_LEM = np.zeros((num_layers, num_experts, 2), dtype=np.int64)
        for layer, ids_TK in enumerate(self.ids_LTK):
            for modality, chosen_T in enumerate((~self.is_vision_T, self.is_vision_T)):
                ids = ids_TK[chosen_T]
                counts_E = np.bincount(ids[ids >= 0], minlength=num_experts)
                rows_LEM[layer, :, modality] = counts_E
        return rows_LEM


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingTokens:
    """A sampled pass whose rows are on their way to the host; `build` may wait for the device."""

    build: Callable[[], TokenPass]
    num_missed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigChange:
    """The configuration was changed between two passes."""

    config: Config


Event = TracedPass | ConfigChange
