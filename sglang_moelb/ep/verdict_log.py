"""The verdict for people: a line in the log from time to time, and a field of the status."""

from __future__ import annotations

import logging
import time
from typing import Any

from sglang_moelb.controller.verdict import line
from sglang_moelb.types import Effects

logger = logging.getLogger("sglang_moelb")


class VerdictLog:
    """Logs the newest verdict once every `verdict.log_interval_s` while passes come."""

    def __init__(self) -> None:
        self._logged_s = time.monotonic()

    def add(self, effects: Effects) -> None:
        """Take in what a step of the controller brought about; for its thread."""
        verdict = effects.verdict
        if verdict is None:
            return
        now_s = time.monotonic()
        if now_s - self._logged_s >= verdict.log_interval_s:
            self._logged_s = now_s
            logger.info("sglang_moelb: verdict: %s", line(verdict))


def plain(effects: Effects | None) -> dict[str, Any] | None:
    """The verdict as plain JSON types; None where there is none."""
    verdict = effects.verdict if effects else None
    if verdict is None:
        return None
    return {
        "lever": verdict.lever.name.lower(),
        "text": verdict.text,
        "reason": verdict.reason,
        "num_passes": verdict.num_passes,
        "num_passes_needed": verdict.num_passes_needed,
        "num_small_passes": verdict.num_small_passes,
        "scores": {
            score.lever.name.lower(): {
                "gain": score.gain,
                "gain_low": score.gain_low,
                "gain_high": score.gain_high,
                "lost_mass_share": score.lost_mass_share,
                "low_share": score.low_share,
                "own_time_measured": score.measured,
            }
            for score in verdict.scores
        },
    }
