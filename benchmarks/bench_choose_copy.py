"""Times `choose_copy` of one rank's ids: decode batches and prefill.

Shape letters: T tokens, K top-k, E experts, C most copies, B bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.choose_copy import choose_copy

NUM_EXPERTS, TOPK, NUM_RANKS, NUM_REPLICAS = 128, 8, 4, 8


def make_cases(device: str) -> Iterator[BenchCase]:
    """64 to 16,384 tokens; bytes are ids read and written once."""
    copies_EC = torch.full((NUM_EXPERTS, 2), -1, dtype=torch.int32, device=device)
    copies_EC[:, 0] = torch.arange(NUM_EXPERTS)
    copies_EC[:NUM_REPLICAS, 1] = NUM_EXPERTS + torch.arange(NUM_REPLICAS)
    num_copies_E = (copies_EC >= 0).sum(dim=1).int()
    bounds_EB = torch.zeros(NUM_EXPERTS, 6, dtype=torch.int32, device=device)
    bounds_EB[:NUM_REPLICAS] = 64
    bounds_EB[:NUM_REPLICAS, 0] = 20
    for num_tokens in (64, 4096, 16384):
        ids_TK = torch.rand(num_tokens, NUM_EXPERTS, device=device).topk(TOPK, dim=1).indices
        yield BenchCase(
            op="choose_copy",
            label=f"T={num_tokens} E={NUM_EXPERTS} K={TOPK}",
            call=partial(choose_copy, ids_TK, copies_EC, num_copies_E, bounds_EB, shift=1),
            num_bytes=2 * ids_TK.nbytes,
        )


if __name__ == "__main__":
    main(make_cases)
