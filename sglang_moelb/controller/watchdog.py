"""Whether the controller has fallen behind, and what a mode allows, for the serving thread."""

from __future__ import annotations

from dataclasses import replace

from sglang_moelb.types import Lever, Mode, Policy


def is_stale(
    *, num_submitted: int, num_done: int, oldest_unread_age_s: float, timeout_s: float
) -> bool:
    """True where the policy must be `none` because nobody reads the records.

    A record counts as unread only once a further pass has been submitted after it: the record of
    the last pass before a quiet hour is old, but nobody has waited for it. Both must hold: two
    records without an answer, and the oldest of them older than `timeout_s`.

    Runs on the host, in the serving thread. Ours.
    """
    return num_submitted - num_done >= 2 and oldest_unread_age_s > timeout_s


def in_mode(mode: Mode, policy: Policy) -> Policy:
    """`policy` as `mode` allows it: the kill switch does not wait for the controller it stops."""
    if mode not in ("none", "observe") or policy.lever is Lever.NONE:
        return policy
    return replace(policy, epoch=policy.epoch + 1, lever=Lever.NONE, reason=f"mode {mode}")
