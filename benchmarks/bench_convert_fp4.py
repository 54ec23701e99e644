"""Times `convert_fp4` on a layer of Qwen3-30B-A3B's shapes, beside a copy of the same weights.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel_bench import BenchCase, main
from torch import Tensor

from sglang_moelb.kernels.block_format import BlockFormat, empty_block_scaled
from sglang_moelb.kernels.convert_fp4 import convert_fp4
from sglang_moelb.kernels.scale_layout import ScaleLayout

NUM_EXPERTS, HIDDEN, INNER = 32, 2048, 768
FORMATS = (BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL, BlockFormat.NVFP4)


def make_weights(num_experts: int, device: str) -> tuple[Tensor, Tensor]:
    """Gate and up, and down, of a layer."""
    shapes = ((num_experts, 2 * INNER, HIDDEN), (num_experts, HIDDEN, INNER))
    gate_up, down = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    return gate_up, down


def make_cases(device: str) -> Iterator[BenchCase]:
    """All experts and a quarter of them; all programs, and as many as a third of an H100 or all
    of it could hold at one a multiprocessor and at four.
    """
    num_experts = NUM_EXPERTS if device == "cuda" else 1
    weights = make_weights(num_experts, device)
    num_elements = sum(tensor.numel() for tensor in weights)
    room = tuple(torch.empty_like(tensor) for tensor in weights)
    yield BenchCase(
        op="copy",
        label=f"bfloat16 E={num_experts}",
        call=lambda: [to.copy_(of) for to, of in zip(room, weights, strict=True)],
        num_bytes=4 * num_elements,
    )
    for layout in (ScaleLayout.SWIZZLED_128X4, ScaleLayout.MN_MAJOR):
        out = tuple(
            empty_block_scaled(tuple(w.shape), BlockFormat.MXFP4_CEIL, device, layout)
            for w in weights
        )
        yield BenchCase(
            op="convert_fp4",
            label=f"mxfp4_ceil E={num_experts} {layout.value}",
            call=partial(
                convert_fp4,
                weights,
                torch.ones(num_experts, dtype=torch.int32, device=device),
                out,
            ),
            num_bytes=2 * num_elements + num_elements // 2 + num_elements // 32,
        )
    for block_format in FORMATS:
        out = tuple(empty_block_scaled(tuple(w.shape), block_format, device) for w in weights)
        all_E = torch.ones(num_experts, dtype=torch.int32, device=device)
        quarter_E = (torch.arange(num_experts, device=device) % 4 == 0).int()
        for wanted_E, num_programs in (
            (all_E, 0),
            (all_E, 44),
            (all_E, 176),
            (all_E, 528),
            (quarter_E, 0),
        ):
            num_wanted = int(wanted_E.sum())
            size = num_elements * num_wanted // num_experts
            yield BenchCase(
                op="convert_fp4",
                label=f"{block_format.value} E={num_wanted} programs={num_programs or 'all'}",
                call=partial(convert_fp4, weights, wanted_E, out, num_programs=num_programs),
                num_bytes=2 * size + size // 2 + size // block_format.block_size,
            )


if __name__ == "__main__":
    main(make_cases)
