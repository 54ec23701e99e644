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
RETRY_PASSES = 256  # a lever that has not been used for so long may be tried anew


@dataclass(frozen=True, kw_only=True, slots=True)
class AssumedCost:
    """Of a lever never used here: `fixed_ms + per_none * none_ms` a MoE layer.

    `none_ms` is what a pass without a lever takes for counting and exchanging once, measured here:
    a lever does that in every layer. So a device that waits for its host tells beforehand that a
    lever will wait too.
    """

    fixed_ms: float
    per_none: float

    def layer_ms(self, none_ms: float) -> float:
        """What is assumed of one layer."""
        return self.fixed_ms + self.per_none * none_ms

    def none_ms(self, layer_ms: float) -> float:
        """The inverse of `layer_ms`, at least 0."""
        return max((layer_ms - self.fixed_ms) / self.per_none, 0.0)


# Through both measurements of drop on 4 H100 (docs/results.md): 0.118 ms a layer where none takes
# 0.04 a pass, at 16,384 tokens a rank, and 0.944 where it takes 0.61, at 1,024. Of expand only the
# first, 0.49, is known.
ASSUMED = {
    Lever.DROP: AssumedCost(fixed_ms=0.06, per_none=1.45),
    Lever.EXPAND: AssumedCost(fixed_ms=0.43, per_none=1.45),
    # Drop's, and what its kernels take more on an H100: reroute 0.01 to 0.02 ms, plan 0.01.
    Lever.REPLICATE: AssumedCost(fixed_ms=0.09, per_none=1.45),
}
ASSUMED_OTHERS = ASSUMED[Lever.EXPAND]
ASSUMED_WITHIN = 2.0  # what is assumed may be half or twice


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

    def extra_ms(self, lever: Lever, num_layers: int) -> float:
        """What `lever` takes beyond a pass without one.

        Where that is not known, or too old, the least that can be assumed of it, so that it is
        tried unless it is hopeless: half of what a device that waits for its host adds. Beside an
        exact lever that is known it is taken to take as much as that one: no quality is spent on
        finding out. 0 where nothing is known.
        """
        if self._knows(lever):
            return max(self.ms[lever] - self.ms[Lever.NONE], 0.0)
        waiting_ms = assumed_of(lever).per_none * self._none_ms(num_layers)
        exact_ms = self.ms[EXACT] - self.ms[Lever.NONE] if self._knows(EXACT) else 0.0
        return max(waiting_ms * num_layers / ASSUMED_WITHIN, exact_ms)

    def _none_ms(self, num_layers: int) -> float:
        """What a pass without a lever takes: measured, or told by the levers that are known."""
        if self.ms[Lever.NONE] > 0.0:
            return self.ms[Lever.NONE]
        told = [
            assumed_of(lever).none_ms(self.ms[lever] / num_layers)
            for lever in Lever
            if self._knows(lever)
        ]
        return min(told, default=0.0)

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

    def extra_ms(self, lever: Lever, sizes: Mapping[int, int], num_layers: int) -> float:
        """What `lever` takes in so many passes of each size beyond those without one."""
        return math.fsum(
            num_passes * self.by_size.get(size, UNKNOWN).extra_ms(lever, num_layers)
            for size, num_passes in sizes.items()
        )


UNKNOWN = OwnTime()


def assumed_of(lever: Lever) -> AssumedCost:
    """What is assumed of a lever that was not used yet."""
    return ASSUMED.get(lever, ASSUMED_OTHERS)


def size_of(num_tokens: int) -> int:
    """The power of two of a pass's tokens. Runs on the host."""
    return num_tokens.bit_length()
