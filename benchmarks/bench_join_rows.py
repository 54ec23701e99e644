"""Times `join_rows` on what a rank of two of Qwen3-30B-A3B leaves in decode.

Shape letters: e local experts, M rows that one has room for, H features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.join_rows import join_rows

NUM_HIGH, NUM_LOW, HIDDEN = 55, 17, 2048


def make_cases(device: str) -> Iterator[BenchCase]:
    """Few rows an expert and all that there is room for; bytes are rows read and written once."""
    for max_rows, num_rows in ((256, 2), (256, 16), (256, 256)) if device == "cuda" else ((16, 2),):
        first, second = (
            torch.randn(n, max_rows, HIDDEN, device=device).bfloat16() for n in (NUM_HIGH, NUM_LOW)
        )
        num_rows_e = torch.full((NUM_HIGH + NUM_LOW,), num_rows, dtype=torch.int32, device=device)
        yield BenchCase(
            op="join_rows",
            label=f"e={NUM_HIGH}+{NUM_LOW} {num_rows} of {max_rows} rows",
            call=partial(join_rows, first, second, num_rows_e),
            num_bytes=4 * HIDDEN * num_rows * (NUM_HIGH + NUM_LOW),
        )


if __name__ == "__main__":
    main(make_cases)
