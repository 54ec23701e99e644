"""What the ranks agree on for a pass. Light to import: no torch.

Shape letters: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moelb.controller.moves import Moved
from sglang_moelb.types import Policy

PHASES = ("idle", "decode", "prefill")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What one rank brings to a pass: real tokens (no padding), those of prefill, and the phase.

    Of the part of a resident move that is under way: `move_us`, microseconds that it took here, 0
    while not known, and `move_sum`, a checksum where one was taken.
    Of the newest pass that the device has ended and whose experts were timed here: its number
    `timed_step`, and `experts_us`, microseconds over all layers; 0 where none was. The leader keeps
    its own, layer by layer.
    """

    num_tokens: int
    num_prefill_tokens: int
    phase: str
    move_us: int = 0
    move_sum: int = 0
    timed_step: int = 0
    experts_us: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What all ranks hold after the agreement of a pass, in rank order.

    `moved` is None where no resident replica can move.
    """

    policy: Policy
    sizes_R: tuple[Sizes, ...]
    moved: Moved | None = None

    @property
    def phase(self) -> str:
        """Prefill if any rank prefills, else decode if any decodes, else idle."""
        return max((s.phase for s in self.sizes_R), key=PHASES.index)

    @property
    def num_tokens(self) -> int:
        """Real tokens over all ranks."""
        return sum(s.num_tokens for s in self.sizes_R)
