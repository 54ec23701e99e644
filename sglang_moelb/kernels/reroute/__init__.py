"""Logical to physical ids of this rank's rows, by the quotas of a replica plan.

A rank has E/R own experts and S slots, as DeepEP wants equally many physical experts on every rank:
physical id = rank * (E/R + S) + place, where the places of its own experts come first, in order,
and slot s has place E/R + s.

Shape letters: T tokens, K top-k, R ranks, W row width, E logical experts, S slots of a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.reroute import ref

__all__ = ["reroute"]


def reroute(
    ids_TK: Tensor,
    rows_RW: Tensor,
    slots_RS: Tensor,
    quota_ER: Tensor,
    *,
    my_rank: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Send each row of this rank to a copy of its expert, so that the quotas are met exactly.

    Rows whose source has a copy stay there, as many as its quota takes. The rest of an expert's
    rows, source after source, fill the rest of its quotas, rank after rank. So every source knows
    its part from the exchanged counts. A source's rows of an expert are dealt in their order in
    ids, token by token: first those for rank 0, then those for rank 1 and so on. Source: ours, the
    deal is `controller.place_replicas.deal_rows`.

    The logical expert and the weight of a row never change.

    Args:
        ids_TK: int64 or int32 logical ids; entries outside 0..E-1 become -1. May be strided.
        rows_RW: int32 rows of `count_experts` of all ranks; the row `my_rank` counts these ids.
        slots_RS, quota_ER: int32, the plan of `place_replicas` for these rows.
        my_rank: the source rank.
        dtype: of the result, int64 or int32; that of the ids by default.

    Returns:
        physical ids, shaped like ids_TK. Exact, equal on host and device; no sync, two launches.

    Raises:
        ValueError: shapes that do not belong together, or my_rank is none of the ranks.
    """
    if ids_TK.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.reroute import kernel

        return kernel.reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=my_rank, dtype=dtype)
    return ref.reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=my_rank, dtype=dtype)
