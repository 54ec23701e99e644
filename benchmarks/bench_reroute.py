"""Times `reroute` of one rank's ids at 4 and 64 ranks, with 8 slots a rank.

Shape letters: T tokens, K top-k, R ranks, W row width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from kernel_bench import BenchCase, main
from replica_routings import TOPK, RoutingCase, expert_rows, make_rows, routed_ids

from sglang_moelb.kernels.place_replicas import place_replicas
from sglang_moelb.kernels.reroute import reroute

NUM_SLOTS = 8
CASES = (
    RoutingCase(kind="rank", strength=1.0),
    RoutingCase(kind="rank", strength=2.0),
    RoutingCase(kind="rank", strength=3.0),
    RoutingCase(kind="rank", strength=3.0, num_ranks=64, num_experts=256),
)


def make_cases(device: str) -> Iterator[BenchCase]:
    """4,096 and 16,384 tokens; bytes are ids read twice and written once."""
    for num_tokens in (4096, 16384):
        for case in CASES:
            ids_TK = routed_ids(case, num_tokens)
            rows_RE = expert_rows(case, num_tokens)
            rows_RE[0] = np.bincount(ids_TK.flatten().numpy(), minlength=case.num_experts)
            rows_RW = make_rows(rows_RE).to(torch.device(device))
            slots_RS, quota_ER, _ = place_replicas(
                rows_RW,
                num_experts=case.num_experts,
                num_slots=NUM_SLOTS,
                min_rows=64 if case.strength > 1 else 1 << 20,  # balanced: without a copy
            )
            call = partial(reroute, ids_TK.to(device), rows_RW, slots_RS, quota_ER, my_rank=0)
            yield BenchCase(
                op="reroute",
                label=f"T={num_tokens} R={case.num_ranks} E={case.num_experts} {case.name}",
                call=call,
                num_bytes=num_tokens * TOPK * 3 * 8,
            )


if __name__ == "__main__":
    main(make_cases)
