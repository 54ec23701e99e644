"""Times `pull_experts` inside one device: what the kernel takes where no link is in the way.

`tests/gpu/check_pull.py` times it between devices. Shape letters: P parts of an expert, R ranks,
S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.pull_experts import pull_experts

NUM_RANKS, NUM_LOCAL, NUM_SLOTS = 4, 8, 8
ELEMENTS_P = (2 * 2048 * 768, 2048 * 768)  # 9.4 MB in bf16, an expert of Qwen3-30B-A3B


def make_cases(device: str) -> Iterator[BenchCase]:
    """1, 4 and 8 experts by 16 and 32 programs; bytes are read and written once."""
    elements_P = [n if device == "cuda" else n // 64 for n in ELEMENTS_P]
    experts_PR = [
        [torch.zeros(NUM_LOCAL, n, dtype=torch.bfloat16, device=device) for _ in range(NUM_RANKS)]
        for n in elements_P
    ]
    staged_P = [torch.zeros(NUM_SLOTS, n, dtype=torch.bfloat16, device=device) for n in elements_P]
    for num_pulled in (1, 4, 8):
        slots_RS = torch.full((NUM_RANKS, NUM_SLOTS), -1, dtype=torch.int32)
        slots_RS[0, :num_pulled] = NUM_LOCAL + torch.arange(num_pulled)
        for num_programs in (16, 32):
            yield BenchCase(
                op="pull_experts",
                label=f"experts={num_pulled} programs={num_programs}",
                call=partial(
                    pull_experts,
                    experts_PR,
                    slots_RS.to(device),
                    staged_P,
                    my_rank=0,
                    num_programs=num_programs,
                ),
                num_bytes=2 * num_pulled * sum(elements_P) * 2,
            )


if __name__ == "__main__":
    main(make_cases)
