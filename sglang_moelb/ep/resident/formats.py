"""The formats that low experts can be stored in: how each is made, kept, and run.

Shape letters: e local experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from sglang_moelb.ep.low import attach, fp8, marlin, marlin_library
from sglang_moelb.ep.low.fp8 import Fp8Weights
from sglang_moelb.ep.low.marlin import MarlinWeights

NAMES = ("w13", "w2", "w13_scale", "w2_scale")  # the tensors of weights in any of the formats
LowWeights = Fp8Weights | MarlinWeights


class StoredFormat(Protocol):
    """A format of low experts. The modules `ep.low.fp8` and `ep.low.marlin` are two."""

    NAME: str  # as a placement has it

    def allocate(self, layer: Any) -> Any:
        """Room for the weights of a layer like `layer`, filled with zeros, which compute zeros."""

    def store(self, layer: Any, expert: int, into: Any) -> None:
        """Write a local expert of `layer` into the one place of `into`; no host sync."""

    def quantised(self, dispatch_output: Any) -> Any:
        """A copy of a normal dispatch's output with its rows as `run` takes them."""

    def quantised_masked(self, dispatch_output: Any) -> Any:
        """The same of a low-latency dispatch's."""

    def run(self, layer: Any, dispatch_output: Any, weights: Any) -> Any:
        """The experts of `layer` on rows from either: SGLang's input of a combine."""


FORMATS: Mapping[str, StoredFormat] = {fp8.NAME: fp8, marlin.NAME: marlin}


def format_of(weights: LowWeights) -> StoredFormat:
    """The format that `weights` are stored in."""
    return marlin if isinstance(weights, MarlinWeights) else fp8


def format_refusal(name: str, layers: Sequence[Any]) -> tuple[str, str] | None:
    """What keeps experts like those of `layers` from format `name`, and the fix; None if none."""
    return _REFUSALS[name](layers)


def _fp8_refusal(layers: Sequence[Any]) -> tuple[str, str] | None:
    return attach.refusal_of(fp8.NAME, layers, prefills_only=False)


def _marlin_refusal(layers: Sequence[Any]) -> tuple[str, str] | None:
    layer = layers[0]
    return (
        attach.experts_refusal(layers, prefills_only=False)
        or attach.activation_refusal("experts stored in mxfp4", layer, "store them in fp8")
        or (_gpu_refusal(layer.w13_weight) if layer.w13_weight.is_cuda else None)
    )


def _gpu_refusal(weight: torch.Tensor) -> tuple[str, str] | None:
    capability = torch.cuda.get_device_capability(weight.device)
    if capability != marlin_library.HOPPER:
        return (
            "format 'mxfp4' on a GPU of compute capability {}.{}".format(*capability),
            "its kernel is used on Hopper (9.0) only, where the other experts' DeepGEMM runs too; "
            "use a Hopper GPU",
        )
    if weight.dtype != torch.bfloat16:
        return f"--dtype {weight.dtype}", "weights are converted from bfloat16; use bfloat16"
    return marlin_library.library_refusal()


_REFUSALS: Mapping[str, Callable[[Sequence[Any]], tuple[str, str] | None]] = {
    fp8.NAME: _fp8_refusal,
    marlin.NAME: _marlin_refusal,
}
