"""Reference of `sum_words` in plain torch. Shape letters: B bytes, W words of eight bytes."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BYTES = 8


def sum_words(run_B: Tensor) -> Tensor:
    """See `sglang_moelb.kernels.sum_words`. Takes memory of twice the run beside it."""
    words_W = words_of(run_B)
    odd_W = 2 * torch.arange(words_W.numel(), dtype=torch.int64, device=run_B.device) + 1
    return (odd_W * words_W).sum()


def words_of(run_B: Tensor) -> Tensor:
    """The run as int64 `[W]`; ValueError for one that is not of whole words in a row."""
    if run_B.dtype != torch.uint8 or run_B.dim() != 1 or run_B.numel() % WORD_BYTES:
        raise ValueError(
            f"a run of {run_B.dtype} {tuple(run_B.shape)}: give uint8 of one dimension, a multiple "
            f"of {WORD_BYTES} of them"
        )
    if not run_B.is_contiguous() or run_B.data_ptr() % WORD_BYTES:
        raise ValueError(f"a run must be contiguous and begin at a multiple of {WORD_BYTES} bytes")
    return run_B.view(torch.int64)
