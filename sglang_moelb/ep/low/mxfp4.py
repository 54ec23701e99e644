"""Rows in float8 on weights in MXFP4, run by SGLang's DeepGEMM runner on data-centre Blackwell.

The runner takes its precision from the weights that it is given with each call, as in `fp8`. What
it hands on unchanged is made here as DeepGEMM wants it: codes as int8, scales as packed powers of
two. Not yet run on that hardware.

Shape letters: e local experts of this rank, N received rows, H hidden size,
I expert size, J = 2I gate and up.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from sglang_moelb.ep.expert_rows import in_bfloat16
from sglang_moelb.ep.low.fp4 import Fp4Weights
from sglang_moelb.kernels.block_format import BlockFormat, empty_block_scaled
from sglang_moelb.kernels.convert_fp4 import convert_fp4
from sglang_moelb.kernels.quantise_rows import quantise_rows_ue8m0
from sglang_moelb.kernels.scale_layout import ScaleLayout

NAME = "mxfp4"
ROW_GROUP, WEIGHT_BLOCK = 128, 32  # features that share a scale
RECIPES = ((1, ROW_GROUP), (1, WEIGHT_BLOCK))  # DeepGEMM's words for them
GEMM = "m_grouped_fp8_fp4_gemm_nt_contiguous"


def allocate(layer: Any) -> Fp4Weights:
    """Room for the low-precision weights of a layer like `layer`, filled with zeros.

    Codes `[e, J, H/2]`, `[e, H, I/2]`; scales int32, four of a row in a word, along the rows.
    """
    w13, w2 = (
        empty_block_scaled(
            tuple(weight.shape), BlockFormat.MXFP4_CEIL, weight.device, ScaleLayout.MN_MAJOR
        )
        for weight in (layer.w13_weight, layer.w2_weight)
    )
    return Fp4Weights(w13=w13, w2=w2)


def convert(
    layer: Any, into: Fp4Weights, wanted_e: torch.Tensor, num_programs: int | None = None
) -> None:
    """Convert the wanted experts of `layer` in one launch on the current stream; no host sync.

    At most `num_programs` SMs are busy with it.
    """
    weights = (in_bfloat16(layer.w13_weight.data), in_bfloat16(layer.w2_weight.data))
    convert_fp4(weights, wanted_e, (into.w13, into.w2), num_programs=num_programs or 0)


def quantised(dispatch_output: Any) -> Any:
    """The received rows in float8 with packed powers of two, in a copy of `dispatch_output`."""
    q_NH, scale = quantise_rows_ue8m0(in_bfloat16(dispatch_output.hidden_states))
    return dispatch_output._replace(hidden_states=q_NH, hidden_states_scale=scale)


def run(layer: Any, dispatch_output: Any, weights: Fp4Weights) -> Any:
    """The experts of `layer` on rows from `quantised`, which SGLang frees; bfloat16 rows out."""
    return layer.quant_method.runner.run(dispatch_output, _quant_info(weights))


def library_refusal() -> tuple[str, str] | None:
    """What of SGLang or DeepGEMM is not what this format relies on, and the fix; None if all is."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo

    fix = "install sglang 0.5.23 with the DeepGEMM that it asks for, or use mxfp4-emulated"
    if not getattr(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", False):
        return "SGLang without DEEPGEMM_SCALE_UE8M0", f"DeepGEMM is given other scales here; {fix}"
    if not hasattr(importlib.import_module("deep_gemm"), GEMM):
        return f"deep_gemm without {GEMM}", f"it does not multiply MXFP4; {fix}"
    known = getattr(DeepGemmMoeQuantInfo, "__dataclass_fields__", {})
    recipes = (
        _quant_info(None).scale_recipes(
            activation_block_size=ROW_GROUP, hidden_size=4 * ROW_GROUP, activation_scale_width=1
        )
        if "is_fp4_experts" in known and hasattr(DeepGemmMoeQuantInfo, "scale_recipes")
        else None
    )
    if recipes != RECIPES:
        found = f"SGLang's DeepGemmMoeQuantInfo with the recipes {recipes} for FP4 experts"
        return found, f"expected {RECIPES}; {fix}"
    return None


def _quant_info(weights: Fp4Weights | None) -> Any:
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo

    w13, w2 = (weights.w13, weights.w2) if weights else (None, None)
    return DeepGemmMoeQuantInfo(
        w13_weight=w13 and w13.codes.view(torch.int8),
        w2_weight=w2 and w2.codes.view(torch.int8),
        use_fp8=True,
        w13_scale=w13 and w13.scales,
        w2_scale=w2 and w2.scales,
        block_shape=[ROW_GROUP, ROW_GROUP],  # as SGLang says of its own FP4 experts
        is_fp4_experts=True,
    )
