"""What a lever takes of a pass itself: observe, exchange, plan and apply, learned while serving.

Launches and an exchange in every layer are little in a pass of many tokens and a good part of a
short one, so it is learned by powers of two of a pass's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang_moelb.types import Lever, StepRecord

NEWEST = 0.25  # weight of the newest pass
EXACT = Lever.REPLICATE
RETRY_PASSES = 1024  # a lever not used in so many passes of a size is tried anew


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTime:
    """Milliseconds of our own in a pass under each lever, 0 where nothing is known.

    `idle` counts the passes since a lever was last used. A trial takes about five passes.
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
        """What `lever` takes beyond a pass without one.

        Where that is not known, or too old, it is tried, and so taken to take nothing; but beside
        an exact lever that is known it is taken to take as much as that one: no quality is spent on
        finding out.
        """
        known = next((one for one in (lever, EXACT) if self._knows(one)), None)
        return max(self.ms[known] - self.ms[Lever.NONE], 0.0) if known else 0.0

    def _knows(self, lever: Lever) -> bool:
        return self.ms[lever] > 0.0 and self.idle[lever] < RETRY_PASSES


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTimes:
    """Own times by the size of a pass, see `size_of`."""

    by_size: Mapping[int, OwnTime] = field(default_factory=dict)

    def updated(self, record: StepRecord, num_tokens: int) -> OwnTimes:
        """With one more pass, of `num_tokens` over all ranks."""
        size = size_of(num_tokens)
        own = self.by_size.get(size, UNKNOWN)
        return OwnTimes(by_size={**self.by_size, size: own.updated(record)})

    def extra_ms(self, lever: Lever, sizes: Mapping[int, int]) -> float:
        """What `lever` takes in so many passes of each size beyond those without one."""
        return math.fsum(
            num_passes * self.by_size.get(size, UNKNOWN).extra_ms(lever)
            for size, num_passes in sizes.items()
        )


UNKNOWN = OwnTime()


def size_of(num_tokens: int) -> int:
    """The power of two of a pass's tokens. Runs on the host."""
    return num_tokens.bit_length()
