"""Our real-time replicas as a rule: the planner of the controller, layer by layer.

Shape letters: P passes, L MoE layers, R EP ranks, E logical experts.
"""

from __future__ import annotations

import numpy as np

from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.replay.types import Counts, Outcome
from sglang_moelb.types import Lever


def replicate(counts: Counts, *, min_rows: int, num_slots: int) -> Outcome:
    """Rows of each rank when every layer's hot experts are copied as `place_replicas` plans.

    Args:
        counts: the passes.
        min_rows: fewest rows worth a copy.
        num_slots: copies that a rank can hold.

    The plan takes copies for hidden, as that of a server does unless told otherwise; the cost model
    charges what they took where they were measured.
    """
    costs = CopyCosts(min_rows=min_rows)
    after_PLR = counts.rows_PLR.copy()
    for at in np.ndindex(*after_PLR.shape[:2]):
        # A plan asks only for the sums over sources, so one source stands for all.
        rows_RE = np.zeros((counts.num_ranks, counts.rows_PLEM.shape[2]), dtype=np.int64)
        rows_RE[0] = counts.rows_PLEM[at].sum(axis=1)
        after_PLR[at] = place_replicas(rows_RE, num_slots=num_slots, costs=costs).rows_R
    return Outcome(
        rows_PLR=after_PLR, levers_P=np.full(len(counts), Lever.REPLICATE, dtype=np.int64)
    )
