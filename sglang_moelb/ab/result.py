"""The result of a comparison: everything that the tables and plots show, as JSON.

`schema` grows when a field changes its meaning or goes; new fields do not change it.
"""

from __future__ import annotations

import msgspec

SCHEMA = 1


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A number over rounds: the median, the smallest and the largest, and each of them."""

    value: float
    low: float
    high: float
    rounds: list[float]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles in milliseconds, each over the rounds."""

    p50: Spread
    p95: Spread
    p99: Spread


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of request was served: `all`, `image` or `text`. Token rates are a second."""

    kind: str
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_tok_s: Spread | None
    output_tok_s: Spread | None
    requests_s: Spread | None
    ttft_ms: Latency | None
    tpot_ms: Latency | None  # (end to end - TTFT) / (output tokens - 1)
    latency_ms: Latency | None


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute differences of the log-probability of the chosen token, both arms choosing it."""

    num_tokens: int
    mean: float
    max: float


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Greedy tokens of an arm against those of the first arm, request by request.

    `token_share` is the tokens before the first difference over all tokens (of the longer answer).
    """

    kind: str
    num_pairs: int
    num_equal: int
    equal_share: float
    token_share: float
    distance_all: Distance | None  # over the common prefix of every pair
    distance_equal: Distance | None  # over the pairs whose whole sequences are equal
    logprob_coverage: float  # share of common tokens for which both log-probabilities are known


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A number and its 95 % interval."""

    value: float
    interval: tuple[float, float]


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Share of right answers of an arm: of `all`, `image`, `text` or a group of the workload.

    The interval is Wilson's for `num_requests`: several rounds of a request are one item.
    """

    name: str
    num_requests: int
    num_answers: int
    num_right: int
    accuracy: Estimate


class PairedAccuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Right answers of an arm against the first arm's, request by request, same rounds.

    `num_lost` requests are right less often than in the first arm, `num_won` more often.
    `p_value` is McNemar's exact test. `smallest_difference` is what this number of requests
    shows in 80 % of cases, given how often the arms differ.
    """

    name: str
    num_requests: int
    num_lost: int
    num_won: int
    difference: Estimate
    p_value: float
    smallest_difference: float


class LayerBalance(msgspec.Struct, frozen=True, kw_only=True):
    """Max/mean rows over ranks of one MoE layer, over prefill passes; 1.0 is perfect."""

    layer: int
    before_mean: float
    before_p95: float
    after_mean: float
    after_p95: float


class ReasonCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many passes had this lever for this reason. Numbers in the reason are replaced by #."""

    lever: str
    used: bool
    reason: str
    num_passes: int
    example: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """From `step` on, the policy `epoch` held, with this lever, for this reason."""

    step: int
    epoch: int
    lever: str
    reason: str


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """What the server's passes recorded after the warm-up."""

    mode: str
    form: str
    num_seen: int
    num_passes: int  # by the server's own counter
    num_by_phase: dict[str, int]
    num_by_lever: dict[str, int]
    layers: list[LayerBalance]
    balance_before: float
    balance_after: float
    balance_before_acted: float | None  # of the prefill passes in which a lever acted
    balance_after_acted: float | None
    busiest_before: float  # rows of the busiest rank of each prefill pass, all layers, in units
    busiest_after: float  # of the mean rank's rows before the lever
    vision_token_share: float
    lost_share: float  # of all routed weight, decode included
    moved_share: float
    lost_share_prefill: float  # of the routed weight of the prefill passes that were seen
    num_dropped_rows: int
    num_added_rows: int
    overhead_share: float  # our own time over the time of the passes
    step_ms_by_phase: dict[str, float]
    reasons: list[ReasonCount]
    choices: list[Choice]
    controller_states: list[str]
    last_decision: dict[str, str]
    quality_budget: float | None
    error: str


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """One arm."""

    name: str
    flags: list[str]
    url: str | None
    command: list[str]
    failure: str
    start_s: float | None
    wall_s: list[float]
    served: list[Served]
    failures: dict[str, int]
    agreement: list[Agreement]
    accuracy: list[Accuracy]  # empty where no request has an answer
    paired_accuracy: list[PairedAccuracy]  # empty for the first arm
    passes: Passes | None
    status_error: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A measure of an arm against the first arm, as a share: +0.05 is 5 % more."""

    arm: str
    measure: str
    change: float
    within_spread: bool


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Where, when and how it was measured."""

    date: str
    command: str
    seed: int
    model: str
    workload: str
    num_requests: int
    num_image_requests: int
    num_images: int
    num_answers: int  # requests whose right answer is known
    rounds: int
    concurrency: int
    max_tokens: int
    num_warmup: int
    order: list[str]
    prefix_cache: bool
    common_flags: list[str]
    cpu: str
    num_cores: int
    memory_gib: float
    gpus: list[str]
    load_before: float | None  # running processes of the machine, 1 min average, before the start
    versions: dict[str, str]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison. The first arm is the one that the others are compared with."""

    schema: int
    conditions: Conditions
    arms: list[ArmResult]
    differences: list[Difference]
    repeat: list[Agreement]  # the first arm's later rounds against its own first: the noise floor
