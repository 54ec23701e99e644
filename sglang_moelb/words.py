"""The words that stand for the choices of a configuration, and what they mean inside."""

from __future__ import annotations

from sglang_moelb.types import MODES, Expansion, Form, Level, Lever, Metric, Preference, Rule, Scope

LEVELS = {"expert": Level.EXPERT, "device": Level.DEVICE}
SCOPES = {"source": Scope.SOURCE, "global": Scope.GLOBAL}
METRICS = {
    "score": Metric.SCORE,
    "order": Metric.ORDER,
    "reverse": Metric.REVERSE,
    "random": Metric.RANDOM,
}
PREFERENCES = {
    "uniform": Preference.UNIFORM,
    "image-first": Preference.IMAGE_FIRST,
    "text-first": Preference.TEXT_FIRST,
}
EXPANSIONS = {"compete": Expansion.COMPETE, "fill": Expansion.FILL}
RULES = {"plain": Rule.PLAIN, "macs": Rule.MACS}
FORMS = {"rank": Form.RANK, "experts": Form.EXPERTS, "fewest": Form.FEWEST}
FORMATS = ("auto", "fp8", "mxfp4", "nvfp4-emulated", "mxfp4-emulated")
LEVERS = {
    "expand": Lever.EXPAND,
    "drop": Lever.DROP,
    "downgrade": Lever.DOWNGRADE,
    "replicate": Lever.REPLICATE,
}
FAULTS = ("none", "die", "hang")
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "capacity.level": tuple(LEVELS),
    "capacity.scope": tuple(SCOPES),
    "capacity.metric": tuple(METRICS),
    "capacity.preference": tuple(PREFERENCES),
    "capacity.rule": tuple(RULES),
    "capacity.expansion": tuple(EXPANSIONS),
    "downgrade.form": tuple(FORMS),
    "resident.split": ("even", "quota"),
    "downgrade.format": FORMATS,
    "fault.controller": FAULTS,
}
