"""What a lever takes of a pass itself: observe, exchange, plan and apply, learned while serving.

Launches and an exchange in every layer are little in a pass of many tokens and a good part of a
short one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sglang_moelb.types import Lever, StepRecord

NEWEST = 0.25  # weight of the newest pass
FADING = 0.99  # a pass, of what is known of a lever that is not in use: it is tried again in time


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTime:
    """Milliseconds of our own in a pass under each lever, 0 where nothing is known."""

    ms: tuple[float, ...] = (0.0,) * len(Lever)

    def updated(self, record: StepRecord) -> OwnTime:
        """With one more pass; a time that is not finite or not positive is ignored. Ours."""
        took_ms = record.balance_ms
        if not math.isfinite(took_ms) or took_ms <= 0.0:
            return self
        used = record.used_lever
        ms = [
            known * (FADING if lever is not Lever.NONE else 1.0)
            for lever, known in zip(Lever, self.ms, strict=True)
        ]
        before_ms = self.ms[used]
        ms[used] = before_ms + NEWEST * (took_ms - before_ms) if before_ms else took_ms
        return replace(self, ms=tuple(ms))

    def extra_ms(self, lever: Lever) -> float:
        """What `lever` takes beyond a pass without one; 0 until it has been used."""
        return max(self.ms[lever] - self.ms[Lever.NONE], 0.0) if self.ms[lever] else 0.0
