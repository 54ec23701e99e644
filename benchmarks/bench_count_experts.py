"""Times `count_experts` as `observe` (no keys) and as `drop` and `expand` (with keys) call it.

Shape letters: T tokens, K top-k, C columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kernel_bench import BenchCase, main

from sglang_moelb.kernels.count_experts import KeyRule, count_experts
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.types import Metric, Preference

TOPK, NUM_EXPERTS = 8, 128
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


if __name__ == "__main__":
    main(make_cases)
