"""Times `sum_words` on one expert of Qwen3-235B-A22B in fp8, as a move between passes sums it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.sum_words import sum_words


def make_cases(device: str) -> Iterator[BenchCase]:
    """Bytes are read once."""
    for num_bytes in (4_720_128, 18_878_976) if device == "cuda" else (80_000,):
        run_B = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        yield BenchCase(
            op="sum_words",
            label=f"{num_bytes / 1e6:.1f} MB",
            call=partial(sum_words, run_B),
            num_bytes=num_bytes,
        )


if __name__ == "__main__":
    main(make_cases)
