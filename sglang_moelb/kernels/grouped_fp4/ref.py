"""Reference of `grouped_fp4`: dequantise, then multiply in float32. Shape letters as in the
package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled, dequantise
from sglang_moelb.kernels.scale_layout import ScaleLayout

_OF_MXFP4 = {None, BlockFormat.MXFP8, BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL}
ROW_FORMATS: dict[BlockFormat, set[BlockFormat | None]] = {
    BlockFormat.MXFP4: _OF_MXFP4,
    BlockFormat.MXFP4_CEIL: _OF_MXFP4,
    BlockFormat.NVFP4: {None, BlockFormat.NVFP4},
}


def grouped_fp4(
    rows: Tensor | BlockScaled,
    weights: BlockScaled,
    groups_T: Tensor,
    *,
    decode: bool | None = None,
) -> Tensor:
    """See `sglang_moelb.kernels.grouped_fp4`. Runs wherever its tensors are, `decode` or not."""
    rows_TK = dequantise(rows) if isinstance(rows, BlockScaled) else rows.float()
    weights_ENK = dequantise(weights)
    out_TN = rows_TK.new_zeros(len(rows_TK), weights_ENK.shape[1])
    for expert, weights_NK in enumerate(weights_ENK):
        of_expert_T = groups_T == expert
        out_TN[of_expert_T] = rows_TK[of_expert_T] @ weights_NK.T
    return out_TN.bfloat16()


def check(rows: Tensor | BlockScaled, weights: BlockScaled, groups_T: Tensor) -> None:
    """ValueError unless the formats can be multiplied and the shapes fit. Host only."""
    of_rows = rows.format if isinstance(rows, BlockScaled) else None
    if of_rows not in ROW_FORMATS.get(weights.format, set()):
        name = of_rows.value if of_rows else "bfloat16"
        raise ValueError(f"no GEMM of {name} rows on {weights.format.value} weights")
    if not isinstance(rows, BlockScaled) and rows.dtype != torch.bfloat16:
        raise ValueError(f"rows are bfloat16 or BlockScaled, got {rows.dtype}")
    if weights.layout is not ScaleLayout.ROW_MAJOR:
        raise ValueError(f"grouped_fp4 reads row-major scales, got {weights.layout.value}")
    codes = rows.codes if isinstance(rows, BlockScaled) else rows
    width = codes.shape[1] * (of_rows.codes_per_byte if of_rows else 1)
    if 2 * weights.codes.shape[2] != width or groups_T.shape != codes.shape[:1]:
        raise ValueError(
            f"rows of {width} features and {tuple(groups_T.shape)} groups do not fit "
            f"{len(codes)} rows and weights of {2 * weights.codes.shape[2]} features"
        )
