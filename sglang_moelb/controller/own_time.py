"""What a lever takes of a pass itself: observe, exchange, plan and apply, learned while serving.

Launches and an exchange in every layer are little in a pass of many tokens and a good part of a
short one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_moelb.types import Lever, StepRecord

NEWEST = 0.25  # weight of the newest pass
RETRY_PASSES = 256  # a lever that has not been used for so long may be tried anew


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTime:
    """Milliseconds of our own in a pass under each lever, 0 where nothing is known.

    `idle` counts the passes since a lever was last used.
    """

    ms: tuple[float, ...] = (0.0,) * len(Lever)
    idle: tuple[int, ...] = (0,) * len(Lever)

    def updated(self, record: StepRecord) -> OwnTime:
        """With one more pass; a time that is not finite or not positive is ignored. Ours."""
        took_ms = record.balance_ms
        if not math.isfinite(took_ms) or took_ms <= 0.0:
            return self
        used = record.used_lever
        ms, idle = list(self.ms), [passes + 1 for passes in self.idle]
        before_ms = ms[used] if self.idle[used] < RETRY_PASSES else 0.0
        ms[used] = before_ms + NEWEST * (took_ms - before_ms) if before_ms else took_ms
        idle[used] = 0
        return OwnTime(ms=tuple(ms), idle=tuple(idle))

    def extra_ms(self, lever: Lever) -> float:
        """What `lever` takes beyond a pass without one; 0 where that is not known, or too old."""
        if not self.ms[lever] or self.idle[lever] >= RETRY_PASSES:
            return 0.0
        return max(self.ms[lever] - self.ms[Lever.NONE], 0.0)
