"""When the controller counts as fallen behind."""

from __future__ import annotations

import pytest

from sglang_moelb.controller.watchdog import is_stale


@pytest.mark.parametrize(
    ("num_submitted", "num_done", "age_s", "stale"),
    [
        (5, 3, 0.11, True),
        (5, 4, 3600.0, False),  # the last record before a quiet hour: nobody has waited for it
        (5, 3, 0.1, False),
        (5, 5, 3600.0, False),
        (900, 0, 0.01, False),
        (2, 0, 9.0, True),
    ],
)
def test_stale_is_a_record_unread_for_a_further_pass_and_for_the_timeout(
    num_submitted: int, num_done: int, age_s: float, stale: bool
) -> None:
    assert stale is is_stale(
        num_submitted=num_submitted,
        num_done=num_done,
        oldest_unread_age_s=age_s,
        timeout_s=0.1,
    )
