"""The labels of the metrics and all values that each may take, so that series stay bounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from sglang_moelb.types import MODES, Lever, Topology

OTHER = "other"

# Why a policy's lever was not used in a pass: `ep.open_pass.gate_reason` in classes.
GATES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "below_min_tokens": re.compile("below min_batch_tokens"),
        "not_prefill": re.compile("pass: nothing is ever dropped outside prefill"),
    }
)
# Why the controller decided as it did: the sentences of `controller.decide` in classes.
DECISIONS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "budget": re.compile("^(quality|downgrade).budget (spent|is 0)"),
        "no_passes": re.compile("^no prefill pass"),
        "no_times": re.compile("^no time of"),
        "low_confidence": re.compile("^confidence "),
        "too_lossy": re.compile("but (quality|downgrade)_budget .* allows"),
        "dwell": re.compile("^holding "),
        "keep": re.compile("^keeping "),
        "balanced": re.compile("^(balanced|not worth a change)"),
        "gain": re.compile("^[a-z]+ saves "),
        "mode": re.compile("^mode "),
    }
)
OBSERVED = re.compile(r"^observe only: would choose (\w+), because (.*)$", re.DOTALL)

LEVERS = tuple(lever.name.lower() for lever in Lever)
STATES = ("running", "dead", "hung")
TRACE_STATES = ("off", "running", "stopped")
TRACES = ("passes", "tokens")
STALLS = ("controller", "pass", "trace")
WHEN = ("before", "after")
OUTCOMES = ("done", "failed")

# Labels whose values are fixed; those of `layer` and `rank` come from the server's sizes.
VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lever": LEVERS,
        "mode": MODES,
        "state": STATES,
        "trace_state": TRACE_STATES,
        "trace": TRACES,
        "kind": STALLS,
        "when": WHEN,
        "outcome": OUTCOMES,
        "gate": (*GATES, OTHER),
        "reason": (*DECISIONS, OTHER),
    }
)


def values(label: str, topology: Topology) -> tuple[str, ...]:
    """All values of a label on a server of these sizes. Raises `KeyError` for an unknown label."""
    sizes = {"layer": topology.num_layers, "rank": topology.num_ranks}
    if label in sizes:
        return tuple(str(i) for i in range(sizes[label]))
    return VALUES[label]


def gate_class(gate_reason: str) -> str:
    """The class of a record's `gate_reason`, which is not empty."""
    return _class_of(gate_reason, GATES)


def decision_class(lever: str, reason: str) -> tuple[str, str]:
    """The lever that a decision is for and the class of its reason.

    In mode `observe` the lever is the one that would have been chosen. Example: ("none", "observe
    only: would choose drop, because drop saves 5.0 % ...") gives ("drop", "gain").
    """
    observed = OBSERVED.match(reason)
    if observed:
        lever, reason = observed.groups()
    return (lever if lever in LEVERS else LEVERS[0]), _class_of(reason, DECISIONS)


def _class_of(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
    return next((name for name, pattern in patterns.items() if pattern.search(text)), OTHER)
