"""What the ranks agree on for a pass. Light to import: no torch.

Shape letters: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moelb.types import Policy

PHASES = ("idle", "decode", "prefill")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What one rank brings to a pass: real tokens (no padding), those of prefill, and the phase."""

    num_tokens: int
    num_prefill_tokens: int
    phase: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What all ranks hold after the agreement of a pass, in rank order."""

    policy: Policy
    sizes_R: tuple[Sizes, ...]

    @property
    def phase(self) -> str:
        """Prefill if any rank prefills, else decode if any decodes, else idle."""
        return max((s.phase for s in self.sizes_R), key=PHASES.index)

    @property
    def num_tokens(self) -> int:
        """Real tokens over all ranks."""
        return sum(s.num_tokens for s in self.sizes_R)
