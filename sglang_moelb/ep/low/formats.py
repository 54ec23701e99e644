"""What a low precision is to the lever: room for weights, conversion, rows, a run of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sglang_moelb.ep.low import fp8
from sglang_moelb.kernels.block_format import BlockFormat


class LowWeights(Protocol):
    """Both projections of a layer's local experts at low precision."""

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""


class LowFormat(Protocol):
    """A low precision. The module `fp8` is one."""

    def allocate(self, layer: Any) -> Any:
        """Room for the `LowWeights` of a layer like `layer`, filled with zeros."""

    def convert(
        self, layer: Any, into: Any, wanted_e: torch.Tensor, num_programs: int | None = None
    ) -> None:
        """Convert the wanted experts of `layer` on the current stream; no host sync."""

    def quantised(self, dispatch_output: Any) -> Any:
        """A copy of `dispatch_output` with its rows as `run` takes them."""

    def run(self, layer: Any, dispatch_output: Any, weights: Any) -> Any:
        """The experts of `layer` on rows from `quantised`: SGLang's input of a combine."""


def format_named(name: str, layers: Sequence[Any]) -> LowFormat:
    """The format that `downgrade.format` names, for the weights of `layers`."""
    if name == "fp8":
        return fp8
    from sglang_moelb.ep.low.fp4 import EmulatedFp4

    weights, rows = EMULATED[name]
    return EmulatedFp4(layers, weights=weights, rows=rows)


# NVFP4 on both sides is ReaLB's. Rows of MXFP8 on MXFP4 weights are what Blackwell's tensor cores
# and DeepGEMM multiply, which takes a scale for 128 features of a row where this has one for 32.
EMULATED = {
    "nvfp4-emulated": (BlockFormat.NVFP4, BlockFormat.NVFP4),
    "mxfp4-emulated": (BlockFormat.MXFP4_CEIL, BlockFormat.MXFP8),
}
