"""Times `cut_tokens` with nothing to cut, with a cut at the mean, and with all keys equal.

Shape letters: T tokens, K top-k, C columns, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.count_experts import KeyRule, count_experts
from sglang_moelb.kernels.cut_tokens import cut_tokens
from sglang_moelb.kernels.plan_cuts import plan_cuts
from sglang_moelb.kernels.row_layout import histogram_of
from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.types import Metric, Preference

TOPK, NUM_EXPERTS, NUM_RANKS = 8, 128, 4
RULE = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)


def make_cases(device: str) -> Iterator[BenchCase]:
    """1,024 and 16,384 tokens, device and expert level, with 0 and 4 candidates."""
    for num_tokens in (1024, 16384):
        for num_groups, num_extra, capacity_factor, equal_keys in (
            (NUM_RANKS, 0, 1e6, False),
            (NUM_RANKS, 0, 1.0, False),
            (NUM_EXPERTS, 0, 1.0, False),
            (NUM_RANKS, 4, 1.0, False),
            (NUM_RANKS, 0, 1.0, True),
        ):
            num_columns = TOPK + num_extra
            options = {"num_experts": NUM_EXPERTS, "topk": TOPK}
            case = random_routing(
                num_tokens, num_columns, NUM_EXPERTS, seed=1, skew=3.0, device=device
            )
            weights_TC = torch.ones_like(case.weights_TC) if equal_keys else case.weights_TC
            inputs = (case.ids_TC, weights_TC)
            row_W, keys_TC = count_experts(*inputs, case.flags_T, None, key_rule=RULE, **options)
            rows = int(histogram_of(row_W, NUM_EXPERTS).sum())
            capacity = int(capacity_factor * rows / num_groups)
            capacity_G = torch.full((num_groups,), capacity, device=device)
            plan = plan_cuts(row_W[None], capacity_G, my_rank=0, num_experts=NUM_EXPERTS)
            keys = "one key" if equal_keys else "uncut" if capacity_factor > 1 else "score"
            yield BenchCase(
                op="cut_tokens",
                label=f"T={num_tokens} C={num_columns} G={num_groups} {keys}",
                call=partial(cut_tokens, *inputs, keys_TC, case.flags_T, None, *plan, **options),
                num_bytes=num_tokens * (1 + num_columns * (2 * (8 + 4) + 4)),
            )


if __name__ == "__main__":
    main(make_cases)
