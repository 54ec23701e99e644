"""Triton kernel of `sum_words`: a program adds up a block of words; integers add in any order.

Example: the words 5, 0 and 2 in blocks of two:

    program 0 adds 5 * 1 + 0 * 3, program 1 adds 2 * 5 and nothing

Shape letters: B bytes, W words of eight bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels.sum_words.ref import words_of

BLOCK = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_words"])
def _sum(words_ptr, out_ptr, num_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at, mask=at < num_words, other=0)
    tl.atomic_add(out_ptr, tl.sum(words * (2 * at + 1), axis=0))


def sum_words(run_B: Tensor) -> Tensor:
    """See `sglang_moelb.kernels.sum_words`. Runs on the device of its tensor, no sync."""
    words_W = words_of(run_B)
    out = torch.zeros((), dtype=torch.int64, device=run_B.device)
    if words_W.numel():
        _sum[(triton.cdiv(words_W.numel(), BLOCK),)](
            words_W, out, words_W.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
