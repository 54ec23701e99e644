"""Reference of `convert_fp4` in plain torch. Shape letters as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.block_format import (
    BlockFormat,
    BlockScaled,
    check_width,
    quantise_blocks,
)
from sglang_moelb.kernels.scale_layout import stored_shape, to_layout


def convert_fp4(
    weights: tuple[Tensor, ...],
    wanted_E: Tensor,
    out: tuple[BlockScaled, ...],
    *,
    num_programs: int = 0,
) -> None:
    """See `sglang_moelb.kernels.convert_fp4`. Reads `wanted_E` on the host."""
    for tensor, slot in zip(weights, out, strict=True):
        for expert in wanted_E.nonzero()[:, 0].tolist():
            globals_ = None if slot.globals is None else slot.globals[expert : expert + 1]
            part = tensor[expert : expert + 1]
            codes, scales = quantise_blocks(part, globals_, slot.format)
            slot.codes[expert] = codes[0]
            slot.scales[expert] = to_layout(scales, slot.layout)[0]


def check(weights: tuple[Tensor, ...], wanted_E: Tensor, out: tuple[BlockScaled, ...]) -> None:
    """ValueError unless every tensor has a slot of its shape, all in one FP4 format. Host only."""
    if len(weights) not in (1, 2) or len(weights) != len(out):
        raise ValueError(
            f"convert_fp4 takes one or two tensors with as many slots, got {len(weights)} and "
            f"{len(out)}"
        )
    formats = {slot.format for slot in out}
    if len(formats) > 1 or BlockFormat.MXFP8 in formats:
        names = ", ".join(sorted(one.value for one in formats))
        raise ValueError(f"convert_fp4 writes one FP4 format a call, got {names}")
    if len({slot.layout for slot in out}) > 1:
        raise ValueError("convert_fp4 writes one layout of scales a call, got two")
    for tensor, slot in zip(weights, out, strict=True):
        _check_slot(tensor, wanted_E, slot)


def _check_slot(tensor: Tensor, wanted_E: Tensor, slot: BlockScaled) -> None:
    check_width(tensor.shape[-1], slot.format)
    if tensor.dtype != torch.bfloat16 or tensor.dim() != 3 or not tensor.is_contiguous():
        raise ValueError(
            f"convert_fp4 reads contiguous bfloat16 (E, N, K), got {tensor.dtype} "
            f"{tuple(tensor.shape)} of strides {tensor.stride()}"
        )
    rows, width = tensor.shape[:-1], tensor.shape[-1]
    scales = stored_shape((*rows, width // slot.format.block_size), slot.layout)
    expected = ((*rows, width // 2), scales, rows[:1])
    got = (tuple(slot.codes.shape), tuple(slot.scales.shape), tuple(wanted_E.shape))
    if got != expected:
        raise ValueError(
            f"a slot for weights {tuple(tensor.shape)} holds codes, scales and wanted of "
            f"{expected}, got {got}; make it with empty_block_scaled"
        )
