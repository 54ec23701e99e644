"""Whether the controller has fallen behind, from numbers that the serving thread reads for free."""

from __future__ import annotations


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
