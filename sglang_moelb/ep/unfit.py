"""What keeps a server from having a lever on its experts, by flag or part, and the fix.

Said alike to all such levers, each of which gives the reason that is its own. A function returns
the two parts of the message, what and why with the fix, or None where nothing is in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_moelb.ep.dispatchers import dispatchers_of

LOW_LATENCY = "_low_latency_dispatcher"  # of SGLang's dispatcher, where its mode has one


def quantised_refusal(layers: Sequence[Any], why: str) -> tuple[str, str] | None:
    """A checkpoint whose experts are quantised."""
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    if all(isinstance(one.quant_method, UnquantizedFusedMoEMethod) for one in layers):
        return None
    return (
        f"experts of {type(layers[0].quant_method).__name__}",
        f"{why}; serve the bfloat16 checkpoint, without --quantization",
    )


def adapters_refusal(why: str) -> tuple[str, str] | None:
    """LoRA."""
    from sglang.srt.runtime_context import get_lora

    if get_lora().enable_lora or get_lora().lora_paths:
        return "--enable-lora", f"{why}; leave the flag out"
    return None


def runner_refusal(layer: Any, why: str) -> tuple[str, str] | None:
    """Experts that another runner than DeepGEMM's computes."""
    backend = layer.quant_method.runner.runner_backend
    if backend.is_deep_gemm():
        return None
    return f"--moe-runner-backend {backend.value}", f"{why}; use deep_gemm"


def offload_refusal() -> tuple[str, str] | None:
    """Weights that a lever on experts would not find on the device, and the fix; None if all are.
    """
    from sglang.srt.runtime_context import get_exec

    offload = get_exec().offload
    if offload.cpu_offload_gb > 0 or offload.offload_group_size > 0:
        flag = "--cpu-offload-gb" if offload.cpu_offload_gb > 0 else "--offload-group-size"
        return (
            flag,
            "weights that lie on the host are not there to be converted or copied; leave it out",
        )
    return None


def dispatch_refusal(layer: Any, *, prefills_only: bool = True) -> tuple[str, str] | None:
    """What of DeepEP's dispatch experts cannot be run otherwise with, and the fix; None if all can.
    """
    for dispatcher in dispatchers_of(layer):
        normal = getattr(dispatcher, "_normal_dispatcher", None)
        if normal is None and prefills_only:
            return "--deepep-mode low_latency", "such a lever acts in prefill only; use mode none"
        low_latency = None if prefills_only else getattr(dispatcher, LOW_LATENCY, None)
        for mode in filter(None, (normal, low_latency)):
            if mode.use_fp8 or mode.use_mxfp4 or mode.use_mxfp8 or mode.use_nvfp4:
                return (
                    f"dispatch of {mode.deepep_output_dtype.name}",
                    "rows must arrive at the model's precision; use "
                    "--deepep-dispatcher-output-dtype bf16",
                )
    return None
