"""Times `token_amounts` on bfloat16 hidden states, half of the tokens visual.

Shape letters: T tokens, D hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.testing import random_routing
from sglang_moelb.kernels.token_amounts import token_amounts


def make_cases(device: str) -> Iterator[BenchCase]:
    """1,024 and 16,384 tokens of the widths of Qwen3-30B-A3B and of Qwen3-235B-A22B."""
    for num_tokens in (1024, 16384):
        for width in (2048, 4096):
            flags_T = random_routing(num_tokens, 1, 4, seed=1, device=device).flags_T
            hidden_TD = torch.randn(num_tokens, width, device=device).bfloat16()
            valid_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
            num_visual = int((flags_T & 1).sum())
            yield BenchCase(
                op="token_amounts",
                label=f"T={num_tokens} D={width} visual={num_visual}",
                call=partial(token_amounts, hidden_TD, flags_T, valid_T, delta=1.0),
                num_bytes=num_visual * width * 2 + num_tokens * (1 + 1 + 4),
            )


if __name__ == "__main__":
    main(make_cases)
