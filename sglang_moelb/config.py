"""The one configuration tree, and the only reader of the environment.

The tree comes from `--moelb-config` (a file or JSON text) with the other `--moelb-*` flags laid
over it, travels to SGLang's processes as JSON in one environment variable, and is frozen. A wrong
value is an error that names the knob, the value and what would be right.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from sglang_moelb import words
from sglang_moelb.types import Lever, Mode, Policy
from sglang_moelb.words import CHOICES

CONFIG_VARIABLE = "SGLANG_MOELB_CONFIG"
TRACE_VARIABLE = "SGLANG_MOELB_TRACE"

# Policies travel between ranks as millionths in int64, and capacities are multiplied in int64.
Factor = Annotated[float, msgspec.Meta(ge=1e-6, le=1000)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
LAYERS = r"^(all|\d+(-\d+)?(,\d+(-\d+)?)*)?$"
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class ConfigError(ValueError):
    """A knob has a wrong value; the message names knob, value and fix."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class CapacityConfig(_Section, frozen=True):
    """Capacity of the levers `drop` and `expand` (Capacity-Aware Inference, MACS)."""

    factor: Factor = 1.25  # times the mean rows of a group
    level: Literal["expert", "device"] = "device"
    scope: Literal["source", "global"] = "global"
    metric: Literal["score", "order", "reverse", "random"] = "score"
    preference: Literal["uniform", "image-first", "text-first"] = "uniform"
    rule: Literal["plain", "macs"] = "plain"
    expansion: Literal["compete", "fill"] = "fill"
    renormalise: bool = False
    max_extra_experts: Annotated[int, msgspec.Meta(ge=0, le=24)] = 0  # a token; 0: all that fit
    macs_delta: Factor = 1.0
    macs_rho: Share = 0.5
    min_batch_tokens: Count = 2048  # over all ranks; smaller passes are left alone


class DowngradeConfig(_Section, frozen=True):
    """The lever `downgrade` (ReaLB): which ranks, in which form, and what is allocated for it."""

    factor: Annotated[float, msgspec.Meta(ge=1e-6, le=100)] = 1.0  # times the mean rows of a rank
    vision_share: Share = 0.7  # of a rank's rows, above which it may be lowered
    form: Literal["rank", "experts", "fewest"] = "rank"
    # The four below decide what is allocated at start and cannot change while serving.
    ready: bool = False  # also where the start is in another mode, for auto and for hot changes
    format: Literal["auto", "fp8", "mxfp4", "nvfp4-emulated", "mxfp4-emulated"] = "auto"
    slots: Annotated[int, msgspec.Meta(ge=0, le=2)] = 2  # staging; 0: no downgrade
    # Such as "0,4-7" or "all": low-precision copies are kept, and nothing is converted.
    resident_layers: Annotated[str, msgspec.Meta(pattern=LAYERS)] = ""


class ReplicateConfig(_Section, frozen=True):
    """The lever `replicate`: what a copy of an expert must bring, and room for copies."""

    min_rows: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 256  # fewest that a copy is made for
    # Rows computed in the time by which a copy delays its sender and its receiver; 0 if hidden.
    send_rows: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 0
    receive_rows: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 0
    # The two below decide what is allocated at start and cannot change while serving.
    ready: bool = False  # also where the start is in another mode, for auto and for hot changes
    slots: Annotated[int, msgspec.Meta(ge=0, le=255)] = 8  # copies a rank can hold; 0: none


class ResidentConfig(_Section, frozen=True):
    """Lasting replicas and experts stored low (R&Q), loaded at start."""

    # The two below decide what is allocated at start and cannot change while serving.
    placement: str = ""  # a file of `moelb calibrate`; "": none
    recalibrate: bool = False  # move replicas while serving
    move_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 1.0  # stall a pass; 0: none moves
    window_passes: Annotated[int, msgspec.Meta(ge=2, le=4096)] = 128  # prefill passes
    min_gain: Share = 0.05  # of a layer's busiest rank's rows, below which nothing moves
    split: Literal["even", "quota"] = "even"  # of rows between copies; quota with recalibrate


class ControllerConfig(_Section, frozen=True):
    """How the controller decides in mode `auto`."""

    window_passes: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    min_gain: Share = 0.02  # share of step time below which `none` wins
    switch_margin: Share = 0.01  # further gain needed to change lever
    min_dwell_passes: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 4
    quality_budget: Share = 0.05  # share of gate mass that may be lost over the quality window
    downgrade_budget: Share = 1.0  # share of rows at low precision over the same window
    quality_window_passes: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256
    # Least time between two forecasts: between them small passes are only counted.
    interval_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 100.0
    timeout_ms: Milliseconds = 100.0  # a record unread for longer, and for a pass, means `none`


class VerdictConfig(_Section, frozen=True):
    """Whether and how the controller says if a lever should be turned on."""

    enabled: bool = False
    window_passes: Annotated[int, msgspec.Meta(ge=64, le=65536)] = 2048  # prefill passes scored
    log_interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=86_400)] = 60.0


class FaultConfig(_Section, frozen=True):
    """Faults to inject, for tests and drills; never set in production."""

    controller: Literal["none", "die", "hang"] = "none"


class Config(_Section, frozen=True):
    """All of it. `mode` is what the user allows; see `docs/operations.md`."""

    mode: Mode = "none"
    capacity: CapacityConfig = CapacityConfig()
    downgrade: DowngradeConfig = DowngradeConfig()
    replicate: ReplicateConfig = ReplicateConfig()
    resident: ResidentConfig = ResidentConfig()
    controller: ControllerConfig = ControllerConfig()
    verdict: VerdictConfig = VerdictConfig()
    fault: FaultConfig = FaultConfig()

    def to_json(self) -> str:
        """The tree as JSON text; `parse` is its inverse."""
        return msgspec.json.encode(self).decode()


def parse(tree: dict[str, Any]) -> Config:
    """Build a `Config` from plain JSON types. Raises `ConfigError`."""
    _reject_not_finite(tree)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(tree, str(error))) from error


def merge(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with `changes` (a partial tree of plain JSON types) laid over it.

    Raises `ConfigError` for an unknown knob or a wrong value; `config` itself never changes.
    """
    tree = msgspec.to_builtins(config)
    _lay_over(tree, changes, "")
    return parse(tree)


def load(source: str) -> dict[str, Any]:
    """Read the argument of `--moelb-config`: JSON text if it starts with a brace, else a file."""
    text, name = source, "--moelb-config"
    if not source.lstrip().startswith("{"):
        path, name = Path(source), f"--moelb-config {source}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"{name}: cannot be read ({why}). Give a JSON file or JSON text "
                              "that starts with '{'.") from error
    return decode_object(text, name)


def decode_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Read a JSON object. Raises `ConfigError` that begins with `name`."""
    try:
        tree = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise ConfigError(f'{name}: must be a JSON object like {{"mode": "none"}}, found {found}.')
    return tree


def from_environment() -> Config | None:
    """The configuration that the launching process set, or None if the plugin is not asked for."""
    text = os.environ.get(CONFIG_VARIABLE, "")
    return parse(load(text)) if text else None


def to_environment(config: Config, trace: str | None = None, tokens: int = 0) -> None:
    """Hand `config`, and what to trace and where, to the processes that this one will spawn."""
    os.environ[CONFIG_VARIABLE] = config.to_json()
    if trace is not None:
        os.environ[TRACE_VARIABLE] = f"{tokens}:{trace}"


def trace_folder() -> str:
    """Where to write a trace, or "" for none."""
    return os.environ.get(TRACE_VARIABLE, "").partition(":")[2]


def trace_tokens() -> int:
    """One prefill pass of how many is traced token by token; 0 for none."""
    return int(os.environ.get(TRACE_VARIABLE, "").partition(":")[0] or 0)


def flat(config: Config) -> dict[str, Any]:
    """All knobs of `config` by dotted name, in the order of the tree."""
    return _flat(msgspec.to_builtins(config), "")


def knobs() -> list[str]:
    """Dotted names of all knobs, in the order of the tree."""
    return list(flat(Config()))


def policy_of(config: Config, lever: Lever, *, epoch: int, reason: str) -> Policy:
    """The policy that uses `lever` with the knobs of `config`."""
    capacity, downgrade, replicate = config.capacity, config.downgrade, config.replicate
    return Policy(
        epoch=epoch,
        lever=lever,
        capacity_factor=downgrade.factor if lever is Lever.DOWNGRADE else capacity.factor,
        level=words.LEVELS[capacity.level],
        scope=words.SCOPES[capacity.scope],
        metric=words.METRICS[capacity.metric],
        preference=words.PREFERENCES[capacity.preference],
        rule=words.RULES[capacity.rule],
        expansion=words.EXPANSIONS[capacity.expansion],
        renormalise=capacity.renormalise,
        max_extra_experts=capacity.max_extra_experts,
        min_batch_tokens=capacity.min_batch_tokens,
        macs_delta=capacity.macs_delta,
        macs_rho=capacity.macs_rho,
        vision_share=downgrade.vision_share,
        form=words.FORMS[downgrade.form],
        min_copy_rows=replicate.min_rows,
        send_rows=replicate.send_rows,
        receive_rows=replicate.receive_rows,
        move_ms=config.resident.move_ms,
        reason=reason,
    )


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        values |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return values


def _explain(tree: dict[str, Any], error: str) -> str:
    """Turn msgspec's `... - at `$.a.b`` into a message with the knob's name and value."""
    what, _, where = error.partition(" - at `$")
    name = where.rstrip("`").lstrip(".")
    given: Any = tree
    for key in filter(None, name.split(".")):
        given = given.get(key) if isinstance(given, dict) else None
    value = f" is {given!r}" if given is not None and name else ""
    fix = f"one of {', '.join(CHOICES[name])}" if name in CHOICES else what
    if name in CHOICES:
        return f"moelb config: {name}{value}; use {fix}"
    return f"moelb config: {name or 'top level'}{value}: {fix}. Known knobs: {', '.join(knobs())}"


def _lay_over(tree: dict[str, Any], changes: dict[str, Any], prefix: str) -> None:
    for key, value in changes.items():
        name = prefix + key
        if key not in tree:
            raise ConfigError(f"moelb config: unknown knob {name!r}. Known: {', '.join(knobs())}")
        if isinstance(tree[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"moelb config: {name} must be an object, found {value!r}.")
            _lay_over(tree[key], value, name + ".")
        else:
            tree[key] = value


def _reject_not_finite(tree: dict[str, Any]) -> None:
    for name, value in _flat(tree, "").items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"moelb config: {name} is {value}; it must be a finite number")

