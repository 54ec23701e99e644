"""Times `place_replicas` at 4 ranks over rank skews and at 64 ranks, with 8 slots a rank.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from kernel_bench import BenchCase, main
from replica_routings import CASES, expert_rows, make_rows

from sglang_moelb.kernels.place_replicas import place_replicas

NUM_SLOTS = 8


def make_cases(device: str) -> Iterator[BenchCase]:
    """Each routing at 4,096 and 16,384 tokens a rank; bytes are counts read and quotas written."""
    for num_tokens, case in product((4096, 16384), CASES):
        rows_RE = expert_rows(case, num_tokens)
        num_ranks, num_experts = rows_RE.shape
        before_R = rows_RE.sum(axis=0).reshape(num_ranks, -1).sum(axis=1)
        skew = before_R.max() / before_R.mean()
        yield BenchCase(
            op="place_replicas",
            label=f"T={num_tokens} R={num_ranks} E={num_experts} {case.name}, max/mean {skew:.2f}",
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
