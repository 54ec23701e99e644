"""Reference of `convert_fp8` in plain torch. Shape letters as in the package, I experts wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_moelb.kernels.fp8 import GROUP, quantise


def convert_fp8(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    wanted_E: Tensor,
    num_programs: int | None = None,
) -> None:
    """See `sglang_moelb.kernels.convert_fp8`. Runs wherever its tensors are."""
    check_weights(weights, out, scales, wanted_E)
    wanted_I = wanted_E.nonzero()[:, 0]
    for weight_ENK, out_ENK, scale_ENK in zip(weights, out, scales, strict=True):
        _, num_rows, num_columns = weight_ENK.shape
        _, block_rows, block_columns = scale_ENK.shape
        fill = (0, block_columns * GROUP - num_columns, 0, block_rows * GROUP - num_rows)
        blocks = pad(weight_ENK[wanted_I], fill)
        grouped = blocks.view(len(wanted_I), block_rows, GROUP, block_columns, GROUP)
        values, scale = quantise(grouped, (2, 4))
        codes = values.view(torch.uint8).view(blocks.shape)  # torch does not index all fp8
        out_ENK.view(torch.uint8)[wanted_I] = codes[:, :num_rows, :num_columns]
        scale_ENK[wanted_I] = scale[:, :, 0, :, 0]


def check_weights(
    weights: Sequence[Tensor], out: Sequence[Tensor], scales: Sequence[Tensor], wanted_E: Tensor
) -> None:
    """Raise ValueError for tensors that do not belong together. Host only, no sync."""
    if not len(weights) == len(out) == len(scales) > 0:
        raise ValueError(
            f"{len(weights)} weights, {len(out)} outputs and {len(scales)} scales: give one "
            "output and one scale for each of at least one weight"
        )
    num_experts = wanted_E.numel()
    for i, tensors in enumerate(zip(weights, out, scales, strict=True)):
        if not _belong_together(*tensors, num_experts):
            found = (f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in tensors)
            raise ValueError(
                f"weight, output and scale {i} are {', '.join(found)}; they must be contiguous, "
                "torch.bfloat16 (E, N, K), torch.float8_e4m3fn (E, N, K) and torch.float32 "
                f"(E, ceil(N / {GROUP}), ceil(K / {GROUP})) with E = {num_experts} as in wanted_E"
            )


def _belong_together(weight: Tensor, values: Tensor, scale: Tensor, num_experts: int) -> bool:
    if weight.dim() != 3 or len(weight) != num_experts or values.shape != weight.shape:
        return False
    dtypes = (weight.dtype, values.dtype, scale.dtype)
    if dtypes != (torch.bfloat16, torch.float8_e4m3fn, torch.float32):
        return False
    _, num_rows, num_columns = weight.shape
    blocks = (num_experts, -(-num_rows // GROUP), -(-num_columns // GROUP))
    contiguous = weight.is_contiguous() and values.is_contiguous() and scale.is_contiguous()
    return contiguous and scale.shape == blocks
