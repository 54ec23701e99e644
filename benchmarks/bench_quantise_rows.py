"""Times `quantise_rows` and `silu_mul_quantise` on the rows of a rank of Qwen3-30B-A3B.

Shape letters: T rows, H features, N gate and up features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.fp8 import GROUP
from sglang_moelb.kernels.quantise_rows import (
    quantise_rows,
    quantise_rows_ue8m0,
    silu_mul_quantise,
)

HIDDEN, GATE_UP = 2048, 1536


def make_cases(device: str) -> Iterator[BenchCase]:
    """Both layouts of scales, for many rows and few."""
    for num_rows in (16384, 131072) if device == "cuda" else (256,):
        for op, function, width, out_width in (
            ("quantise_rows", quantise_rows, HIDDEN, HIDDEN),
            ("silu_mul_quantise", silu_mul_quantise, GATE_UP, GATE_UP // 2),
        ):
            x_TH = torch.randn(num_rows, width, device=device, dtype=torch.bfloat16)
            for column_major in (False, True):
                yield BenchCase(
                    op=op,
                    label=f"T={num_rows} {width} columns{' column-major' * column_major}",
                    call=partial(function, x_TH, column_major=column_major),
                    num_bytes=num_rows * (2 * width + out_width + 4 * out_width // GROUP),
                )
        x_TH = torch.randn(num_rows, HIDDEN, device=device, dtype=torch.bfloat16)
        yield BenchCase(
            op="quantise_rows",
            label=f"T={num_rows} {HIDDEN} columns ue8m0",
            call=partial(quantise_rows_ue8m0, x_TH),
            num_bytes=num_rows * (3 * HIDDEN + HIDDEN // GROUP),
        )


if __name__ == "__main__":
    main(make_cases)
