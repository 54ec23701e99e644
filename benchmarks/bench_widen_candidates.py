"""Times `widen_candidates` for the local experts of one of 4 ranks.

Shape letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.kernels.widen_candidates import widen_candidates

TOPK, NUM_EXPERTS, NUM_LOCAL = 8, 128, 32


def make_cases(device: str) -> Iterator[BenchCase]:
    """1,024 and 16,384 tokens, 1, 4 and 8 candidates."""
    for num_tokens in (1024, 16384):
        for num_extra in (1, 4, 8):
            case = random_routing(num_tokens, TOPK, NUM_EXPERTS, seed=1, skew=3.0, device=device)
            scores_TE = torch.randn(num_tokens, NUM_EXPERTS, device=device).softmax(dim=1)
            width = TOPK + num_extra
            yield BenchCase(
                op="widen_candidates",
                label=f"T={num_tokens} K={TOPK} local={NUM_LOCAL} extra={num_extra}",
                call=partial(
                    widen_candidates,
                    case.ids_TC,
                    case.weights_TC,
                    scores_TE,
                    case.flags_T,
                    first_local=NUM_LOCAL,
                    num_local=NUM_LOCAL,
                    num_extra=num_extra,
                ),
                num_bytes=num_tokens * (1 + (TOPK + width) * (8 + 4) + (NUM_LOCAL + 1) * 4),
            )


if __name__ == "__main__":
    main(make_cases)
