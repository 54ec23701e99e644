"""Times `place_replicas` at 4 ranks over rank skews and at 64 ranks, with 8 slots a rank.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from kernel_bench import BenchCase, main
from replica_routings import CASES, expert_rows, make_rows

from sglang_moelb.kernels.place_replicas import place_replicas

NUM_SLOTS = 8
NUM_TOKENS = 4096


def make_cases(device: str) -> Iterator[BenchCase]:
    """One case a routing; bytes are counts read and quotas written."""
    for case in CASES:
        rows_RE = expert_rows(case, NUM_TOKENS)
        num_ranks, num_experts = rows_RE.shape
        before = rows_RE.sum(axis=0).reshape(num_ranks, -1).sum(axis=1)
        yield BenchCase(
            op="place_replicas",
            label=f"R={num_ranks} E={num_experts} {case.name} {np.max(before) / before.mean():.2f}",
            call=partial(
                place_replicas,
                make_rows(rows_RE).to(torch.device(device)),
                num_experts=num_experts,
                num_slots=NUM_SLOTS,
                min_rows=64,
            ),
            num_bytes=num_ranks * num_experts * (8 + 4),
        )


if __name__ == "__main__":
    main(make_cases)
