"""Reference of `quantise_rows_fp4` in plain torch. Shape letters as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.block_format import (
    BlockFormat,
    BlockScaled,
    check_width,
    global_scales,
    quantise_blocks,
)


def quantise_rows_fp4(x_TK: Tensor, *, block_format: BlockFormat) -> BlockScaled:
    """See `sglang_moelb.kernels.quantise_rows_fp4`. Runs wherever its tensors are."""
    globals_T = global_scales(x_TK) if block_format.has_global else None
    codes, scales = quantise_blocks(x_TK, globals_T, block_format)
    return BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_T)


def check(x_TK: Tensor, block_format: BlockFormat) -> None:
    """ValueError unless rows are bfloat16 and whole blocks. Host only."""
    if x_TK.dtype != torch.bfloat16 or x_TK.dim() != 2:
        raise ValueError(
            f"quantise_rows_fp4 reads bfloat16 (T, K), got {x_TK.dtype} {tuple(x_TK.shape)}"
        )
    check_width(x_TK.shape[1], block_format)
