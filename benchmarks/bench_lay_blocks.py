"""Times `lay_blocks` on what a rank of two of Qwen3-30B-A3B receives for low experts.

Shape letters: e local experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.lay_blocks import lay_blocks

NUM_LOW = 9


def make_cases(device: str) -> Iterator[BenchCase]:
    """Decode with few rows and many, and a prefill; bytes are tables written once."""
    for room, num_rows, block in ((256, 2, 8), (256, 256, 64), (0, 4096, 64)):
        num_rows_e = torch.full((NUM_LOW,), num_rows, dtype=torch.int32, device=device)
        total = NUM_LOW * (room or num_rows)
        num_blocks = total // block + NUM_LOW * (room == 0)
        yield BenchCase(
            op="lay_blocks",
            label=f"e={NUM_LOW} {num_rows} rows, room {room}, blocks of {block}",
            call=partial(lay_blocks, num_rows_e, num_rows=total, room=room, block=block),
            num_bytes=4 * num_blocks * (block + 1),
        )


if __name__ == "__main__":
    main(make_cases)
