"""The nouns of sglang_moelb, in the order in which one forward pass makes them.

A pass: the ranks agree on a `Policy`; every MoE layer counts, exchanges, plans and applies; the
pass leaves one `StepRecord`, from which the controller makes the next `Policy`.

Glossary. A *logical* expert is one of the model's E experts; *local* experts are the E/R of one
rank. A *row* is one assignment of a token to an expert. *Balancedness* is max/mean over ranks, 1.0
is perfect. An *amount* is what a row weighs against a capacity: 1, or under MACS 1 to 256 (1.0).
A *group* is what a capacity holds for: an expert, or all experts of a rank. A *lever* is what can
be done about imbalance; a *mode* is what the user allows; a *policy* is what holds for one pass.

Shape letters: L MoE layers, E logical experts, R ranks, G groups, M modalities (text, vision).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

Mode = Literal["none", "observe", "expand", "drop", "downgrade", "replicate", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)
Phase = Literal["prefill", "decode", "idle"]


class Lever(IntEnum):
    """What is done about imbalance in a pass; the value travels between ranks."""

    NONE = 0
    EXPAND = 1
    DROP = 2
    DOWNGRADE = 3
    REPLICATE = 4

    @property
    def cuts(self) -> bool:
        """Whether it changes routing, so that gate mass is measured and can be lost."""
        return self in (Lever.EXPAND, Lever.DROP)


class Metric(IntEnum):
    """By what rows are ranked against a capacity; the best ranked are kept."""

    SCORE = 0
    ORDER = 1
    REVERSE = 2
    RANDOM = 3


class Preference(IntEnum):
    """Which modality is cut first when a group overflows."""

    UNIFORM = 0
    IMAGE_FIRST = 1
    TEXT_FIRST = 2


class Level(IntEnum):
    """What a capacity holds for."""

    EXPERT = 0
    DEVICE = 1


class Scope(IntEnum):
    """Whose rows a capacity counts: those of each source rank alone, or of all ranks."""

    SOURCE = 0
    GLOBAL = 1


class Expansion(IntEnum):
    """How candidates of an expansion meet routed rows at a capacity.

    COMPETE: ranked together (Capacity-Aware Inference, Algorithm 2). FILL: only where routed rows
    leave room (ours), so that expansion never displaces a routed row.
    """

    COMPETE = 0
    FILL = 1


class Rule(IntEnum):
    """How capacity is counted: equal rows, or MACS (entropy-weighted, modality-adaptive)."""

    PLAIN = 0
    MACS = 1


class Form(IntEnum):
    """What of an overloaded rank runs at low precision.

    RANK: all its experts (ReaLB). EXPERTS: those above the mean of an expert. FEWEST: as few as
    bring the rank's predicted time to the mean. The last two are ours.
    """

    RANK = 0
    EXPERTS = 1
    FEWEST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What every rank does in one pass. Made by the controller, agreed by all ranks.

    `epoch` grows with every change; `capacity_factor` is a multiple of the mean rows of a group;
    under the lever downgrade a rank above it is lowered where more than `vision_share` of its rows
    are vision, in `form`; under replicate an expert's copy takes `min_copy_rows` or more, and costs
    its sender and its receiver the time of `send_rows` and `receive_rows`; `macs_delta` and
    `macs_rho` are MACS's; `move` is the newest move of a resident replica, 0 for none, at `move_ms`
    a pass at most, and `split` the newest shares of replicas; `reason` is for people.
    """

    epoch: int
    lever: Lever = Lever.NONE
    capacity_factor: float = 1.0
    level: Level = Level.DEVICE
    scope: Scope = Scope.GLOBAL
    metric: Metric = Metric.SCORE
    preference: Preference = Preference.UNIFORM
    rule: Rule = Rule.PLAIN
    expansion: Expansion = Expansion.FILL
    renormalise: bool = False
    max_extra_experts: int = 0
    min_batch_tokens: int = 0
    macs_delta: float = 1.0
    macs_rho: float = 0.5
    vision_share: float = 0.7
    form: Form = Form.RANK
    min_copy_rows: int = 256
    send_rows: int = 0
    receive_rows: int = 0
    move: int = 0
    move_ms: float = 1.0
    split: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Sizes that do not change while a server runs."""

    num_layers: int
    num_experts: int
    num_ranks: int
    topk: int

    @property
    def experts_per_rank(self) -> int:
        """E / R."""
        return self.num_experts // self.num_ranks


class RankReport(NamedTuple):
    """What the experts of another rank took in pass `step`, over all layers."""

    rank: int
    step: int
    experts_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one pass saw and did, equal on all ranks but for the times, which are this rank's.

    `rows_LEM` are top-k rows before any lever; `rows_after_LR` what each rank's experts receive
    after it (exact under the plain rule, an estimate under MACS), the rows before where none acted.
    `low_rows_LR` of those ran at low precision; None where the lever downgrade did not act.
    `num_copies_LR` experts were copied to each rank; None where the lever replicate did not act.
    Gate mass is the sum of routing weights; masses and numbers of dropped and added rows are of
    all ranks' tokens, over all layers. Times are in milliseconds, 0 where not known yet. Arrays
    are not to be written. `reports` are of earlier passes, as they came with this one.
    """

    step: int
    policy: Policy
    phase: Phase
    gate_reason: str  # why the policy's lever was not used in this pass, or ""
    rank: int
    num_tokens_R: IntArray
    num_vision_tokens_R: IntArray
    num_protected_tokens_R: IntArray  # nothing of them is cut: of decode, or refused
    num_refused_tokens_R: IntArray  # of requests that refuse lossy levers
    rows_LEM: IntArray
    rows_after_LR: IntArray
    routed_mass: float
    lost_mass: float
    moved_mass: float
    num_dropped_rows: int
    num_added_rows: int
    experts_ms_L: FloatArray  # grouped GEMMs of this rank
    layer_ms_L: FloatArray  # from before dispatch to after combine, this rank
    balance_ms: float  # our own observe + exchange + plan + apply: layers by the fastest of them
    step_ms: float
    low_rows_LR: IntArray | None = None
    num_copies_LR: IntArray | None = None
    reports: tuple[RankReport, ...] = ()

    @property
    def used_lever(self) -> Lever:
        """The lever that acted in this pass."""
        return Lever.NONE if self.gate_reason else self.policy.lever


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """A record and the time it came in; the controller's only input."""

    record: StepRecord
    now_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LeverForecast:
    """What a lever would do to the passes of the window, had it been on in all of them."""

    lever: Lever
    balance: float  # mean over layers of max/mean rank rows it would leave
    gain: float  # share of step time saved, 0.05 is 5 %
    lost_mass_share: float  # share of routed gate mass lost
    low_share: float = 0.0  # share of rows that would run at low precision


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadEstimate:
    """What the controller believes after the last pass; `confidence` in [0, 1]."""

    num_passes: int
    confidence: float
    balance_L: FloatArray  # max/mean rank rows per layer before any lever
    moe_share: float  # share of a prefill step spent in experts of the slowest rank
    ms_per_row: float
    fixed_ms: float
    spent_mass_share: float  # gate mass lost over the quality window, as a share
    forecasts: tuple[LeverForecast, ...]
    spent_low_share: float = 0.0  # rows run at low precision over the quality window, as a share


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The lever chosen for the next pass, and why, in a sentence a user can act on."""

    lever: Lever
    reason: str
    expected_gain: float
    expected_lost_mass_share: float
    expected_low_share: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LeverScore:
    """What a lever would have brought and cost in the passes scored, had it been on in them.

    Gains are shares of the prefill time, the bounds those of a 90 % interval; the lost share is of
    the gate mass of passes large enough for a lever, the low share of their rows at low precision.
    `measured`: what the lever takes itself was measured on this server, not assumed.
    """

    lever: Lever
    gain: float
    gain_low: float
    gain_high: float
    lost_mass_share: float
    low_share: float
    measured: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether to turn a lever on, and which: `lever` is NONE where it is better left off.

    `text` is the line for people, `reason` the part of it that says why. Of the last passes,
    `num_passes` were large enough for a lever and are scored, of `num_passes_needed`;
    `num_small_passes` were prefill passes in which none can act.
    """

    lever: Lever
    text: str
    reason: str
    num_passes: int
    num_passes_needed: int
    num_small_passes: int
    scores: tuple[LeverScore, ...]
    log_interval_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """All that a controller step brings about; no verdict unless it was asked for."""

    policy: Policy
    decision: Decision
    estimate: LoadEstimate
    verdict: Verdict | None = None
