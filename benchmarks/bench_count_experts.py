"""Times `count_layers` as `observe` calls it, and `count_experts` as `drop` and `expand` do.

Shape letters: L layers, T tokens, K top-k, C columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.count_experts import KeyRule, count_experts, count_layers
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.types import Metric, Preference

NUM_LAYERS, TOPK, NUM_EXPERTS = 48, 8, 128
RULE = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)


def make_cases(device: str) -> Iterator[BenchCase]:
    """Batches of 1,024 and 16,384 tokens, even and skewed, with and without keys and amounts."""
    for num_tokens in (1024, 16384):
        for skew, num_extra, rule, weighted in (
            (0.0, 0, None, False),
            (3.0, 0, None, False),
            (3.0, 0, RULE, False),
            (3.0, 4, RULE, False),
            (3.0, 4, RULE, True),
        ):
            num_columns = TOPK + num_extra
            case = random_routing(
                num_tokens,
                num_columns,
                NUM_EXPERTS,
                seed=1,
                skew=skew,
                weighted=weighted,
                device=device,
            )
            width = row_width(NUM_EXPERTS, with_histogram=rule is not None)
            per_entry = 8 if rule is None else 8 + 4 + 4
            per_token = 1 + 4 * weighted + num_columns * per_entry
            kind = "observe" if rule is None else "keys"
            yield BenchCase(
                op="count_experts",
                label=f"{kind} T={num_tokens} C={num_columns} skew={skew} macs={weighted:d}",
                call=partial(
                    count_experts,
                    case.ids_TC,
                    case.weights_TC,
                    case.flags_T,
                    case.amounts_T,
                    num_experts=NUM_EXPERTS,
                    topk=TOPK,
                    key_rule=rule,
                ),
                num_bytes=num_tokens * per_token + 4 * width,
            )
        yield _all_layers(num_tokens, device)


def _all_layers(num_tokens: int, device: str) -> BenchCase:
    """All layers of a pass without a lever."""
    cases = [
        random_routing(num_tokens, TOPK, NUM_EXPERTS, seed=layer, skew=3.0, device=device)
        for layer in range(NUM_LAYERS)
    ]
    ids_LTK = torch.stack([case.ids_TC for case in cases])
    width = row_width(NUM_EXPERTS, with_histogram=False)
    return BenchCase(
        op="count_layers",
        label=f"L={NUM_LAYERS} T={num_tokens} K={TOPK} skew=3.0",
        call=partial(count_layers, ids_LTK, cases[0].flags_T, num_experts=NUM_EXPERTS),
        num_bytes=NUM_LAYERS * (8 * num_tokens * TOPK + 4 * width) + num_tokens,
    )


if __name__ == "__main__":
    main(make_cases)
