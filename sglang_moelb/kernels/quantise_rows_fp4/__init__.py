"""Activations to MXFP4, NVFP4 or MXFP8, a row at a time.

Shape letters: T rows (may be 0), K features, B elements of a block.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.quantise_rows_fp4 import ref

__all__ = ["quantise_rows_fp4"]


def quantise_rows_fp4(x_TK: Tensor, *, block_format: BlockFormat) -> BlockScaled:
    """Quantise rows for a GEMM on FP4 weights, in one pass over them.

    A row's bytes depend on that row alone. NVFP4's `globals` are amax / (448 * 6) of each row, so
    that an outlier costs its own row's precision only. NaN and infinity survive as NaN: such a
    block gets a NaN scale, hence every output of its row is NaN and no other row's; the rest of
    the row is quantised as if that block were 0.

    Args:
        x_TK: bfloat16, K a multiple of the block. Rows may be strided.
        block_format: see `block_format.BlockFormat`.

    Returns:
        A new `BlockScaled` of (T, K), scales row-major. Equal, bit by bit, on host and device; no
        host sync, may be captured.

    Raises:
        ValueError: the dtype is not bfloat16 or K is no multiple of the block.
    """
    ref.check(x_TK, block_format)
    if x_TK.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.quantise_rows_fp4 import kernel

        return kernel.quantise_rows_fp4(x_TK, block_format=block_format)
    return ref.quantise_rows_fp4(x_TK, block_format=block_format)
