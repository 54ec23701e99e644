"""By how much copies of experts make the experts of a layer take longer, learned while serving.

Copies travel under the dispatch. What is left of them when the rows have arrived, and what a
grouped run over more experts takes beyond its rows, shows in the time of the experts.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_moelb.types import StepRecord

if TYPE_CHECKING:
    from sglang_moelb.controller.cost import CostModel

PRIOR_LAYERS = 4.0  # so many measured layers weigh as much as the prior: all hidden
FORGETTING = 0.98
OUTLIER = 5.0  # times the time without copies


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyCost:
    """Sums over layers in which this rank received copies, with forgetting."""

    ms: float = 0.0
    num_layers: float = 0.0

    @property
    def layer_ms(self) -> float:
        """What copies add to a layer in which some are made."""
        return max(self.ms / (self.num_layers + PRIOR_LAYERS), 0.0)

    def updated(self, record: StepRecord, cost: CostModel) -> CopyCost:
        """With one more pass, against what `cost` says of its rows without copies.

        Times that are not finite, not positive or outliers are ignored. Runs on the host. Ours.
        """
        if record.num_copies_LR is None or cost.ms_per_row <= 0.0:
            return self
        ms_L = record.experts_ms_L
        plain_L = cost.fixed_ms + cost.ms_per_row * record.rows_after_LR[:, record.rank]
        known_L = (record.num_copies_LR[:, record.rank] > 0) & (ms_L > 0)
        known_L &= ms_L < OUTLIER * plain_L
        num_known = int(known_L.sum())
        if not num_known:
            return self
        return CopyCost(
            ms=FORGETTING * self.ms + float((ms_L - plain_L)[known_L].sum()),
            num_layers=FORGETTING * self.num_layers + num_known,
        )


HIDDEN = CopyCost()
