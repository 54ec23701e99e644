"""Grouped expert GEMM on FP4 weights.

Shape letters: T rows (may be 0), E local experts, K features, N output features, S scales of a row.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.block_format import BlockScaled
from sglang_moelb.kernels.grouped_fp4 import ref

__all__ = ["grouped_fp4"]


def grouped_fp4(
    rows: Tensor | BlockScaled,
    weights: BlockScaled,
    groups_T: Tensor,
    *,
    decode: bool | None = None,
) -> Tensor:
    """Each row times the transposed weights of its expert.

    Pairs of formats: weights MXFP4 or MXFP4_CEIL with rows bfloat16, MXFP8, MXFP4 or MXFP4_CEIL;
    weights NVFP4 with rows bfloat16 or NVFP4. A row's result does not depend on other rows.

    Args:
        rows: bfloat16 (T, K), or `quantise_rows_fp4` of it.
        weights: of (E, N, K), scales row-major.
        groups_T: int32 expert of each row. Rows of one expert should follow each other, as in
            DeepGEMM's contiguous layout, but need no alignment. A row whose expert is outside
            0..E-1 (-1 for padding) is not read and comes out 0.
        decode: True decodes the codes in registers and multiplies in bfloat16, False leaves it to
            `tl.dot_scaled`; None takes what the device can do (`low_precision.can_dot_scaled`).

    Returns:
        bfloat16 (T, N): sums of exact products in float32, rounded once. Host and device differ by
        the order of the sums. NaN scales give NaN. No host sync, may be captured.

    Raises:
        ValueError: the formats cannot be multiplied, or shapes do not fit.
    """
    ref.check(rows, weights, groups_T)
    if weights.codes.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.grouped_fp4 import kernel

        return kernel.grouped_fp4(rows, weights, groups_T, decode=decode)
    return ref.grouped_fp4(rows, weights, groups_T, decode=decode)
