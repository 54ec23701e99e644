"""Times `grouped_fp4` in every pair of formats and path, beside torch's bfloat16 `bmm`.

On a device without FP4 both paths multiply in bfloat16: they show what emulation costs, not what
the format gains.

Shape letters: T rows, E experts, N output features, K features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main

from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled, quantise_blocks
from sglang_moelb.kernels.block_format import global_scales as scales_of
from sglang_moelb.kernels.grouped_fp4 import grouped_fp4
from sglang_moelb.kernels.low_precision import can_dot_scaled
from sglang_moelb.kernels.quantise_rows_fp4 import quantise_rows_fp4

NUM_EXPERTS, HIDDEN, INNER = 32, 2048, 768
PAIRS = (
    (None, BlockFormat.MXFP4_CEIL),
    (BlockFormat.MXFP8, BlockFormat.MXFP4_CEIL),
    (BlockFormat.MXFP4_CEIL, BlockFormat.MXFP4_CEIL),
    (None, BlockFormat.NVFP4),
    (BlockFormat.NVFP4, BlockFormat.NVFP4),
)


def make_cases(device: str) -> Iterator[BenchCase]:
    """Both GEMMs of a layer of Qwen3-30B-A3B, 16,384 rows evenly over 32 experts."""
    is_cuda = device == "cuda"
    num_experts, num_rows = (NUM_EXPERTS, 16384) if is_cuda else (2, 128)
    capability = torch.cuda.get_device_capability() if is_cuda else None
    groups_T = torch.arange(num_experts, device=device, dtype=torch.int32)
    groups_T = groups_T.repeat_interleave(num_rows // num_experts)
    for outputs, width in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        x_TK = torch.randn(num_rows, width, device=device, dtype=torch.bfloat16)
        weights_ENK = torch.randn(num_experts, outputs, width, device=device, dtype=torch.bfloat16)
        sizes = f"T={num_rows} N={outputs} K={width}"
        num_out_bytes = 2 * num_rows * outputs
        yield BenchCase(
            op="bmm",
            label=f"bfloat16 {sizes}",
            call=partial(torch.bmm, x_TK.view(num_experts, -1, width), weights_ENK.mT),
            num_bytes=2 * x_TK.numel() + 2 * weights_ENK.numel() + num_out_bytes,
        )
        for row_format, block_format in PAIRS:
            globals_ = scales_of(weights_ENK) if block_format.has_global else None
            codes, scales = quantise_blocks(weights_ENK, globals_, block_format)
            weights = BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_)
            rows, num_row_bytes = x_TK, 2 * x_TK.numel()
            if row_format is not None:
                rows = quantise_rows_fp4(x_TK, block_format=row_format)
                num_row_bytes = rows.codes.numel() + rows.scales.numel()
            for decode in (True, False):
                if decode or can_dot_scaled(capability, row_format, block_format):
                    name = row_format.value if row_format else "bfloat16"
                    path = "decoded" if decode else "scaled"
                    yield BenchCase(
                        op="grouped_fp4",
                        label=f"{name} {block_format.value} {path} N={outputs}",
                        call=partial(grouped_fp4, rows, weights, groups_T, decode=decode),
                        num_bytes=num_row_bytes + codes.numel() + scales.numel() + num_out_bytes,
                    )


if __name__ == "__main__":
    main(make_cases)
