"""When the controller counts as fallen behind, and what a mode allows."""

from __future__ import annotations

import pytest

from sglang_moelb.controller.watchdog import in_mode, is_stale
from sglang_moelb.types import MODES, Lever, Mode, Policy


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


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_without_a_lever_allows_none_at_once(mode: Mode) -> None:
    for lever in Lever:
        policy = Policy(epoch=3, lever=lever, reason="as said")
        allowed = in_mode(mode, policy)
        if mode in ("none", "observe") and lever is not Lever.NONE:
            assert allowed == Policy(epoch=4, lever=Lever.NONE, reason=f"mode {mode}")
        else:
            assert allowed is policy
