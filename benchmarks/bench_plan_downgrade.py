"""Times `plan_downgrade` for every form.

Shape letters: E experts, R ranks, W row width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kernel_bench import BenchCase, main

from sglang_moelb.kernels.count_experts import count_experts
from sglang_moelb.kernels.plan_downgrade import plan_downgrade
from sglang_moelb.kernels.row_layout import NUM_HEADER
from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.types import Form

TOPK, NUM_TOKENS = 8, 1024


def make_cases(device: str) -> Iterator[BenchCase]:
    """4 ranks of 128 experts and 64 ranks of 256, skewed and mostly vision."""
    for num_ranks, num_experts in ((4, 128), (64, 256)):
        case = random_routing(
            NUM_TOKENS, TOPK, num_experts, seed=1, skew=3.0, vision_share=0.9,
            protected_share=0.0, device=device,
        )  # fmt: skip
        row_W, _ = count_experts(
            case.ids_TC,
            case.weights_TC,
            case.flags_T,
            None,
            num_experts=num_experts,
            topk=TOPK,
            key_rule=None,
        )
        counts_RW = row_W.repeat(num_ranks, 1)
        for form in Form:
            yield BenchCase(
                op="plan_downgrade",
                label=f"R={num_ranks} E={num_experts} {form.name.lower()}",
                call=partial(
                    plan_downgrade,
                    counts_RW,
                    num_experts=num_experts,
                    capacity_factor=1.0,
                    vision_share=0.7,
                    form=form,
                ),
                num_bytes=4 * (num_ranks * (row_W.numel() - NUM_HEADER) + num_experts),
            )


if __name__ == "__main__":
    main(make_cases)
