"""Times `plan_cuts` at expert and device level, in the scopes of all ranks and of the source.

Shape letters: E experts, R ranks, G groups, W row width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.count_experts import KeyRule, count_experts
from sglang_moelb.kernels.plan_cuts import plan_cuts
from sglang_moelb.kernels.row_layout import NUM_BINS
from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.types import Metric, Preference

TOPK, NUM_TOKENS = 8, 1024
RULE = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)


def make_cases(device: str) -> Iterator[BenchCase]:
    """4 and 64 ranks; capacity is the mean, so that about half of the groups are cut."""
    for num_ranks, num_experts in ((1, 128), (4, 128), (64, 256)):
        case = random_routing(NUM_TOKENS, TOPK, num_experts, seed=1, skew=3.0, device=device)
        row_W, _ = count_experts(
            case.ids_TC,
            case.weights_TC,
            case.flags_T,
            None,
            num_experts=num_experts,
            topk=TOPK,
            key_rule=RULE,
        )
        rows_RW = row_W.repeat(num_ranks, 1)
        for num_groups in (num_experts, max(num_ranks, 4)):
            mean = num_ranks * NUM_TOKENS * TOPK // num_groups
            capacity_G = torch.full((num_groups,), mean, device=device)
            yield BenchCase(
                op="plan_cuts",
                label=f"R={num_ranks} E={num_experts} G={num_groups}",
                call=partial(
                    plan_cuts,
                    rows_RW,
                    capacity_G,
                    my_rank=num_ranks - 1,
                    num_experts=num_experts,
                ),
                num_bytes=num_ranks * num_experts * (NUM_BINS + 1) * 4 + num_groups * 16,
            )


if __name__ == "__main__":
    main(make_cases)
