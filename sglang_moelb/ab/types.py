"""The nouns of an A/B run, in the order in which they are made.

Arms and a workload go in; each session of an arm leaves outcomes of its requests and, where the
server has the plugin, the records of its passes. Measures and the report read nothing else.

Shape letters: L MoE layers, R EP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

Kind = Literal["image", "text"]
Message = dict[str, Any]


class AbError(ValueError):
    """The user asked for something that cannot be done; the message names it and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One side of the comparison: a server started with `flags`, or a running one at `url`."""

    name: str
    flags: tuple[str, ...] = ()
    url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One chat request. `messages` is the OpenAI list; images are data URIs in it.

    `answer` is the right answer where there is one, `group` what it is counted under.
    """

    request_id: int
    messages: tuple[Message, ...]
    num_images: int
    num_chars: int
    num_pixels: int = 0
    answer: str | None = None
    group: str = ""

    @property
    def kind(self) -> Kind:
        """`image` if the request carries at least one image."""
        return "image" if self.num_images else "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came back for one request, or `error`. Times on the client's monotonic clock.

    `text` is what a user reads. `token_ids` are exact where the server sends them (SGLang does),
    else empty. `logprobs[i]` belongs to token i and is None where the stream did not carry it.
    """

    request_id: int
    kind: Kind
    round: int
    start_s: float
    ttft_ms: float = 0.0
    latency_ms: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    token_texts: tuple[str | None, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    finish_reason: str = ""
    text: str = ""
    error: str = ""

    @property
    def tokens(self) -> tuple[int | str | None, ...]:
        """What identifies the tokens: ids where known, else their texts."""
        return self.token_ids or self.token_texts


class PassRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass as `GET /moelb/status` lists it under `recent`.

    `lever` is the one that acted, `policy_lever` the one that the policy named, which a gate may
    have held back (`gate_reason`). Balances are max/mean over ranks, 1.0 is perfect; rows are
    summed over layers.
    """

    step: int
    phase: str
    lever: str
    policy_lever: str = ""
    epoch: int = 0
    reason: str = ""
    gate_reason: str = ""
    num_tokens_R: list[int] = []
    num_vision_tokens_R: list[int] = []
    balance_before_L: list[float] = []
    balance_after_L: list[float] = []
    rows_before_R: list[float] = []
    rows_after_R: list[float] = []
    lost_share: float = 0.0
    moved_share: float = 0.0
    step_ms: float = 0.0
    experts_ms: float = 0.0
    balance_ms: float = 0.0


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the server started."""

    num_passes: int = 0
    num_prefill_passes: int = 0
    num_passes_by_lever: dict[str, int] = {}
    routed_mass: float = 0.0
    lost_mass: float = 0.0
    moved_mass: float = 0.0
    num_dropped_rows: int = 0
    num_added_rows: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /moelb/status`, as far as the comparison needs it."""

    active: bool
    form: str = ""
    mode: str = ""
    config: dict[str, Any] = {}
    topology: dict[str, int] = {}
    policy: dict[str, Any] = {}
    controller: dict[str, Any] = {}
    totals: Totals = Totals()
    recent: list[PassRecord] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What polling the status gave over one session, without the warm-up."""

    first: Status
    last: Status
    passes: tuple[PassRecord, ...]
    controller_states: tuple[str, ...]  # each state once, in the order of its first appearance
    error: str = ""  # why polling ended early, or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTime:
    """How long one timed round took, from the first request sent to the last one done."""

    round: int
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One time that an arm was driven: warm-up, then timed rounds. Rounds count over the arm."""

    outcomes: tuple[Outcome, ...]
    rounds: tuple[RoundTime, ...]
    observed: Observed | None
    start_s: float  # seconds from the start of the server until it was ready
    failure: str = ""
    status_error: str = ""  # why there are no pass records although the server has the route


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """All sessions of an arm, and the command that started its server."""

    arm: Arm
    command: tuple[str, ...]
    sessions: tuple[Session, ...] = ()
    failure: str = ""

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of all sessions, in order."""
        return [outcome for session in self.sessions for outcome in session.outcomes]

    @property
    def passes(self) -> list[PassRecord]:
        """The pass records of all sessions, in order."""
        return [p for s in self.sessions if s.observed for p in s.observed.passes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to run: made from the command line, read by every stage."""

    arms: tuple[Arm, ...]
    order: tuple[str, ...]  # names of arms, one a session
    requests: tuple[Request, ...]
    workload: str
    model: str
    common_flags: tuple[str, ...]
    rounds: int
    concurrency: int
    max_tokens: int
    num_warmup: int
    seed: int
    out: Path
    cpu: bool
    num_ranks: int
    port: int | None = None
    ready_timeout_s: float = 300.0
    request_timeout_s: float = 120.0
    prefix_cache: bool = False
    argv: tuple[str, ...] = field(default=())
