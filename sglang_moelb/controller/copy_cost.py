"""By how much copies of experts make the experts of a layer take longer, learned while serving.

Copies travel under the dispatch. What is left of them when the rows have arrived, and what a
grouped run over more experts takes beyond its rows, shows in the time of the experts.

Shape letters: N measured times of a rank, G layers that one of them is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_moelb.controller.cost import CostModel
    from sglang_moelb.controller.rank_times import RankTimes

PRIOR_COPIES = 32.0  # so many measured copies weigh as much as the prior: all hidden
FORGETTING = 0.98


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyCost:
    """Sums over copies that ranks received, with forgetting."""

    ms: float = 0.0
    num_copies: float = 0.0

    @property
    def copy_ms(self) -> float:
        """What each copy adds to a layer of the rank that receives it."""
        return max(self.ms / (self.num_copies + PRIOR_COPIES), 0.0)

    def updated(self, times: RankTimes, cost: CostModel) -> CopyCost:
        """With what one rank took in a pass, against what `cost` says of its rows without copies.

        Times that are not finite, not positive or outliers are ignored. Runs on the host. Ours.
        """
        copies_N = times.copies_NG.sum(axis=1)
        plain_N = times.plain_ms(cost.fixed_ms, cost.ms_per_row)
        known_N = (copies_N > 0) & times.usable(plain_N)
        if cost.ms_per_row <= 0.0 or not known_N.any():
            return self
        return CopyCost(
            ms=FORGETTING * self.ms + float((times.ms_N - plain_N)[known_N].sum()),
            num_copies=FORGETTING * self.num_copies + int(copies_N[known_N].sum()),
        )


HIDDEN = CopyCost()
