"""Times `quantise_rows_fp4` on the inputs of both GEMMs of an expert layer.

Shape letters: T rows, K features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.block_format import BlockFormat
from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4


def make_cases(device: str) -> Iterator[BenchCase]:
    """1,024 and 65,536 rows of the hidden and of the inner width of Qwen3-30B-A3B."""
    for num_rows in (1024, 65536) if device == "cuda" else (1024,):
        for width in (2048, 768):
            x_TK = torch.randn(num_rows, width, device=device, dtype=torch.bfloat16)
            for block_format in BlockFormat:
                written = 1 / block_format.codes_per_byte + 1 / block_format.block_size
                yield BenchCase(
                    op="quantise_rows_fp4",
                    label=f"{block_format.value} T={num_rows} K={width}",
                    call=partial(quantise_rows_fp4, x_TK, block_format=block_format),
                    num_bytes=int(x_TK.numel() * (2 + written)),
                )


if __name__ == "__main__":
    main(make_cases)
