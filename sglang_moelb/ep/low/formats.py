"""What a low precision is to the lever: room for weights, conversion, rows, a run of experts.

And which one `downgrade.format` means on this device.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from sglang_moelb.ep.low import fp8, mxfp4
from sglang_moelb.kernels.block_format import BlockFormat
from sglang_moelb.kernels.low_precision import Capability, LowPrecision, Proof, formats_for


class LowWeights(Protocol):
    """Both projections of a layer's local experts at low precision."""

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""


class LowFormat(Protocol):
    """A low precision. The modules `fp8` and `mxfp4` are two."""

    NAME: str  # as `downgrade.format` has it

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
    """The format that `downgrade.format` names, for the weights of `layers`.

    Where `format_refusal` refuses nothing.
    """
    name = resolved(name, layers[0].w13_weight.device)
    if name in NATIVE:
        return NATIVE[name]
    from sglang_moelb.ep.low.fp4 import EmulatedFp4

    weights, rows = EMULATED[name]
    return EmulatedFp4(name, layers, weights=weights, rows=rows)


def resolved(name: str, device: torch.device) -> str:
    """`name`, or for "auto" the best format that the lever runs on `device`; "" if none.

    On a CPU that is fp8, whose reference the stand-in computes.
    """
    if name != "auto":
        return name
    wired = _wired(device)
    return wired[0].word if wired else ""


def format_refusal(name: str, weight: torch.Tensor) -> tuple[str, str] | None:
    """What keeps weights like `weight` from `downgrade.format` `name`, and the fix; None if none.
    """
    capability = capability_of(weight.device)
    if capability is not None and weight.dtype != torch.bfloat16:
        return f"--dtype {weight.dtype}", "weights are converted from bfloat16; use bfloat16"
    if name in EMULATED:
        return None
    words = [one.word for one in _wired(weight.device)]
    place = f"a GPU of {_told(capability)}" if capability else "a CPU"
    if not words:
        return place, _ONLY
    if name not in ("auto", *words):
        fix = f"no path is wired for it; the lever takes downgrade.format {words[0]} there"
        fix += ", and mxfp4-emulated for numerics" if name == mxfp4.NAME else ""
        return f"format {name} on {place}", fix
    return mxfp4.library_refusal() if resolved(name, weight.device) == mxfp4.NAME else None


def caution(name: str, device: torch.device) -> str:
    """What is not known of format `name` on `device`; "" where it has run there."""
    for one in _wired(device):
        if one.word == name and one.proof is not Proof.RUN:
            return (
                f"downgrade.format {name} has not yet been run on {_told(capability_of(device))}, "
                "only emulated: compare answers with mode none before you rely on it"
            )
    return ""


def capability_of(device: torch.device) -> Capability | None:
    """Compute capability, None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _wired(device: torch.device) -> list[LowPrecision]:
    capability = capability_of(device)
    if capability is None:
        capability = (9, 0)  # the host computes what Hopper does
        has_deep_gemm = True
    else:
        has_deep_gemm = find_spec("deep_gemm") is not None
    found = formats_for(capability, has_deep_gemm=has_deep_gemm, has_flashinfer=False)
    return [one for one in found if one.word]


def _told(capability: Capability | None) -> str:
    return "compute capability {}.{}".format(*capability) if capability else "no GPU"


_ONLY = (
    "the lever runs fp8 on Hopper (9.0) and mxfp4 on data-centre Blackwell (10.x), both through "
    "an installed DeepGEMM. For numerics without speed set downgrade.format to nvfp4-emulated or "
    "mxfp4-emulated"
)
NATIVE: dict[str, LowFormat] = {fp8.NAME: fp8, mxfp4.NAME: mxfp4}
# NVFP4 on both sides is ReaLB's. Rows of MXFP8 on MXFP4 weights are what Blackwell's tensor cores
# and DeepGEMM multiply, which takes a scale for 128 features of a row where this has one for 32.
EMULATED = {
    "nvfp4-emulated": (BlockFormat.NVFP4, BlockFormat.NVFP4),
    "mxfp4-emulated": (BlockFormat.MXFP4_CEIL, BlockFormat.MXFP8),
}
