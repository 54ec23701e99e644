"""`Policy` as a fixed tuple of integers, so that ranks can agree on it with one small exchange.

The reason does not travel: it is for people, and each rank words its own. Numbers that are not
integers travel in millionths, so a policy that was agreed on holds multiples of 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_moelb.controller.split import NUM_WORDS as NUM_SPLITS
from sglang_moelb.types import (
    Expansion,
    Form,
    Level,
    Lever,
    Metric,
    Policy,
    Preference,
    Rule,
    Scope,
)

FIELDS = (
    "epoch",
    "lever",
    "capacity_factor",
    "level",
    "scope",
    "metric",
    "preference",
    "rule",
    "expansion",
    "renormalise",
    "max_extra_experts",
    "min_batch_tokens",
    "macs_delta",
    "macs_rho",
    "vision_share",
    "form",
    "min_copy_rows",
    "send_rows",
    "receive_rows",
    "move",
    "move_ms",
)
FIXED_POINT = frozenset({"capacity_factor", "macs_delta", "macs_rho", "vision_share", "move_ms"})
NUM_WORDS = len(FIELDS) + NUM_SPLITS
MILLION = 1_000_000


def encode(policy: Policy) -> tuple[int, ...]:
    """`policy` without its reason as NUM_WORDS integers that fit int64. Runs on the host. Ours."""
    assert len(policy.split) <= NUM_SPLITS, policy
    fields = tuple(
        round(getattr(policy, name) * MILLION)
        if name in FIXED_POINT
        else int(getattr(policy, name))
        for name in FIELDS
    )
    return (*fields, *policy.split, *(0,) * (NUM_SPLITS - len(policy.split)))


def decode(words: Sequence[int], reason: str) -> Policy:
    """The policy that `encode` made `words` from, with `reason`.

    Raises `ValueError` where the words are not NUM_WORDS or name no lever, level, scope, metric,
    preference or rule: then the ranks do not run the same version. Runs on the host. Ours.
    """
    if len(words) != NUM_WORDS:
        raise ValueError(
            f"policy: expected {NUM_WORDS} words, found {len(words)}. Run the same version of "
            "sglang_moelb on all ranks."
        )
    word = dict(zip(FIELDS, (int(w) for w in words[: len(FIELDS)]), strict=True))
    return Policy(
        epoch=word["epoch"],
        lever=Lever(word["lever"]),
        capacity_factor=word["capacity_factor"] / MILLION,
        level=Level(word["level"]),
        scope=Scope(word["scope"]),
        metric=Metric(word["metric"]),
        preference=Preference(word["preference"]),
        rule=Rule(word["rule"]),
        expansion=Expansion(word["expansion"]),
        renormalise=bool(word["renormalise"]),
        max_extra_experts=word["max_extra_experts"],
        min_batch_tokens=word["min_batch_tokens"],
        macs_delta=word["macs_delta"] / MILLION,
        macs_rho=word["macs_rho"] / MILLION,
        vision_share=word["vision_share"] / MILLION,
        form=Form(word["form"]),
        min_copy_rows=word["min_copy_rows"],
        send_rows=word["send_rows"],
        receive_rows=word["receive_rows"],
        move=word["move"],
        move_ms=word["move_ms"] / MILLION,
        split=tuple(int(w) for w in words[len(FIELDS) :] if w),
        reason=reason,
    )
