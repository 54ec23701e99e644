"""Times `convert_fp8` of a layer of Qwen3-30B-A3B: all experts, half, none, and few programs.

Shape letters: E local experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from kernel_bench import BenchCase, main
from torch import Tensor

from sglang_moelb.kernels.convert_fp8 import convert_fp8
from sglang_moelb.kernels.fp8 import GROUP

SHAPES = ((1536, 2048), (2048, 768))  # w13 and w2
FEW_PROGRAMS = (44, 32, 20)  # a third of the SMs of an H100, and less


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Weights of a layer and where they are converted to."""

    weights: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that converting all experts reads and writes."""
        return sum(t.numel() * t.element_size() for t in (*self.weights, *self.out, *self.scales))


def make_layer(num_experts: int, device: str) -> Layer:
    """Random weights of the size of Qwen3-30B-A3B's."""
    weights = tuple(
        torch.randn(num_experts, *shape, device=device, dtype=torch.bfloat16) for shape in SHAPES
    )
    return Layer(
        weights=weights,
        out=tuple(torch.empty_like(weight, dtype=torch.float8_e4m3fn) for weight in weights),
        scales=tuple(
            torch.empty(num_experts, *(size // GROUP for size in shape), device=device)
            for shape in SHAPES
        ),
    )


def make_cases(device: str) -> Iterator[BenchCase]:
    """The experts of a rank under EP4 and EP8."""
    for num_experts in (32, 16) if device == "cuda" else (2,):
        layer = make_layer(num_experts, device)
        for name, num_wanted, num_programs in (
            ("all", num_experts, None),
            ("half", num_experts // 2, None),
            ("none", 0, None),
            *((f"all P={few}", num_experts, few) for few in FEW_PROGRAMS),
        ):
            wanted_E = torch.zeros(num_experts, dtype=torch.int32, device=device)
            wanted_E[:num_wanted] = 1
            yield BenchCase(
                op="convert_fp8",
                label=f"E={num_experts} wanted={name}",
                call=partial(
                    convert_fp8,
                    layer.weights,
                    layer.out,
                    layer.scales,
                    wanted_E=wanted_E,
                    num_programs=num_programs,
                ),
                num_bytes=layer.num_bytes * num_wanted // num_experts + 4 * num_experts,
            )


if __name__ == "__main__":
    main(make_cases)
