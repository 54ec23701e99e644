"""What of a configuration can change while a server runs, and how it travels to the ranks.

SGLang's state update carries numbers. Knobs that decide about memory hold from start to end and do
not travel.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_moelb.config import Config, ConfigError, flat, parse
from sglang_moelb.words import CHOICES

# Memory is allocated by these before SGLang sizes its KV cache.
START_KNOBS = (
    "downgrade.ready",
    "downgrade.format",
    "downgrade.slots",
    "downgrade.resident_layers",
    "replicate.ready",
    "replicate.slots",
    "resident.placement",
    "resident.recalibrate",
)
KNOB_PREFIX = "moelb."  # of our knobs in SGLang's state update


def to_numbers(config: Config) -> dict[str, int | float]:
    """`config` as the numbers that SGLang's state update can carry; words become indices.

    Without `START_KNOBS`, which no update can change.
    """
    return {
        k: CHOICES[k].index(v) if k in CHOICES else v
        for k, v in flat(config).items()
        if k not in START_KNOBS
    }


def from_numbers(numbers: dict[str, int | float], start: Config | None = None) -> Config:
    """Inverse of `to_numbers`, with the `START_KNOBS` of `start`. Raises `ConfigError`."""
    tree: dict[str, Any] = start_knobs(start or Config())
    for name, value in numbers.items():
        if name not in _KNOBS or name in START_KNOBS:
            known = ", ".join(k for k in _KNOBS if k not in START_KNOBS)
            raise ConfigError(f"moelb config: unknown knob {name!r}. Known: {known}")
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = _word(name, value)
    return parse(tree)


def as_started(config: Config) -> Config:
    """`config` as a server that starts with it has it: no slots where none are asked for."""
    config = config if wants_slots(config) else without_slots(config)
    return config if wants_replicas(config) else without_replicas(config)


def wants_slots(config: Config) -> bool:
    """Whether a server that starts with `config` is to have room for the lever downgrade."""
    return config.mode == "downgrade" or config.downgrade.ready


def without_slots(config: Config) -> Config:
    """`config` for a server that has allocated nothing for the lever downgrade."""
    return msgspec.structs.replace(
        config, downgrade=msgspec.structs.replace(config.downgrade, slots=0)
    )


def wants_replicas(config: Config) -> bool:
    """Whether a server that starts with `config` is to have room for the lever replicate."""
    return config.mode == "replicate" or config.replicate.ready


def without_replicas(config: Config) -> Config:
    """`config` for a server that has allocated nothing for the lever replicate."""
    return msgspec.structs.replace(
        config, replicate=msgspec.structs.replace(config.replicate, slots=0)
    )


def refuse_change(before: Config, wanted: Config) -> None:
    """Raise `ConfigError` where a server with `before`, as started, cannot change to `wanted`."""
    old, new = flat(before), flat(wanted)
    for name in START_KNOBS:
        if new[name] != old[name]:
            raise ConfigError(
                f"moelb config: {name} is {new[name]!r}: it decides about memory at start, where "
                f"it was {old[name]!r}. Leave it out, or restart the server with it"
            )
    refuse_beside_resident(wanted)
    if wanted.mode == "downgrade" and not before.downgrade.slots:
        raise ConfigError(
            "moelb config: mode is 'downgrade': this server has no memory for low-precision "
            "weights. Restart it with --moelb-mode downgrade, or downgrade.ready true; "
            "the log of the start says if the model does not allow it"
        )
    if wanted.mode == "replicate" and not before.replicate.slots:
        raise ConfigError(
            "moelb config: mode is 'replicate': this server has no memory for copies of experts. "
            "Restart it with --moelb-mode replicate, or replicate.ready true; the log of the start "
            "says if it cannot have them"
        )


def refuse_beside_resident(config: Config) -> None:
    """Raise `ConfigError` for what does not work with `resident.placement`, or without it."""
    if config.resident.split == "quota" and not config.resident.recalibrate:
        raise ConfigError(
            "moelb config: resident.split is 'quota', but resident.recalibrate is not true: the "
            "controller follows the load only with it; set it at start, or use resident.split even"
        )
    if not config.resident.placement:
        if config.resident.recalibrate:
            raise ConfigError(
                "moelb config: resident.recalibrate is True, but resident.placement is not set: "
                "give the file to start from, made by moelb calibrate, or leave it out"
            )
        return
    for name, wrong in (
        (f"mode is {config.mode!r}", config.mode != "none"),
        ("downgrade.ready is true", config.downgrade.ready),
        ("replicate.ready is true", config.replicate.ready),
        ("verdict.enabled is true", config.verdict.enabled),
    ):
        if wrong:
            raise ConfigError(
                f"moelb config: {name}, but resident.placement is set: levers and their forecasts "
                "do not know resident copies yet. Use mode none without the others, or leave "
                "resident.placement out"
            )


def start_knobs(config: Config) -> dict[str, Any]:
    """The part of a tree that holds from start to end."""
    knobs = flat(config)
    tree: dict[str, Any] = {}
    for name in START_KNOBS:
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = knobs[name]
    return tree


def _word(name: str, value: int | float) -> Any:
    """The value of knob `name` that travelled as the number `value`."""
    if name not in CHOICES:
        return bool(value) if isinstance(_KNOBS[name], bool) else value
    words = CHOICES[name]
    if value not in range(len(words)):
        raise ConfigError(
            f"moelb config: {name} is number {value}; use 0 to {len(words) - 1} for "
            f"{', '.join(words)}"
        )
    return words[int(value)]


_KNOBS = flat(Config())
