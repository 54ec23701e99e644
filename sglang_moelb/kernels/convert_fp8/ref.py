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
    for i, (weight, values, scale) in enumerate(zip(weights, out, scales, strict=True)):
        blocks = (num_experts, *(-(-size // GROUP) for size in weight.shape[1:]))
        for name, tensor, dtype, shape in (
            ("weight", weight, torch.bfloat16, (num_experts, *weight.shape[1:])),
            ("output", values, torch.float8_e4m3fn, tuple(weight.shape)),
            ("scale", scale, torch.float32, blocks),
        ):
            same = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.dim() == 3
            if not (same and tensor.is_contiguous()):
                raise ValueError(
                    f"{name} {i} is {tensor.dtype} {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}; it must be a contiguous {dtype} {shape}"
                )
