"""SGLang's runner core "deep_gemm" and its torch-native expert function, on the reference experts.

Imports SGLang: load it only in a process in which the stand-in was asked for.

Shapes: N rows, H hidden size, e local experts, M rows that one has room for in low latency.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import (
    DispatchMoeRunnerCore,
    MoeQuantInfo,
    MoeRunnerConfig,
)
from sglang.srt.layers.moe.token_dispatcher.base import CombineInput, DispatchOutput
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPNormalCombineInput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from sglang_moelb.ep.standin.experts import ACTIVATIONS, run_experts
from sglang_moelb.ep.standin.low_experts import Fp8Experts, run_experts_fp8
from sglang_moelb.kernels.fp8 import GROUP

Run = Callable[[Any, Any, MoeRunnerConfig], torch.Tensor]


class ReferenceRunnerCore(DispatchMoeRunnerCore):
    """Runs the experts of a DeepEP dispatch on the host, in the precision of the weights."""

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        check_supported(config)

    @property
    def runner_backend(self) -> MoeRunnerBackend:
        """The backend that this core takes over."""
        return MoeRunnerBackend.DEEP_GEMM

    def run_from_dispatch(
        self,
        dispatch_output: DispatchOutput,
        quant_info: MoeQuantInfo,
        runner_config: MoeRunnerConfig,
        hooks: object = None,
    ) -> CombineInput:
        """From the rows of `dispatch` to the rows for `combine`, same order and dtype."""
        low = quant_info.w13_weight.dtype is torch.float8_e4m3fn
        layout = dispatch_output.format
        if not (layout.is_deepep_normal() or layout.is_deepep_ll()) or quant_info.use_fp8 != low:
            raise NotImplementedError(
                f"stand-in: format {layout.value}, use_fp8={quant_info.use_fp8}: only DeepEP's "
                "unquantised dispatch runs on CPU, and rows and weights in float8"
            )
        run, combine_input = (_run_fp8 if low else _run), DeepEPNormalCombineInput
        if layout.is_deepep_ll():
            run, combine_input = partial(_run_masked, run), DeepEPLLCombineInput
        return combine_input(
            run(dispatch_output, quant_info, runner_config),
            dispatch_output.topk_ids,
            dispatch_output.topk_weights,
        )


def _run_masked(run: Run, dispatch_output: Any, quant_info: Any, config: Any) -> torch.Tensor:
    """`run` on the rows that are there, each of one expert with weight 1; NaN where none is."""
    rows_eMH, num_rows_e = dispatch_output.hidden_states, dispatch_output.masked_m.long()
    is_there_eM = torch.arange(rows_eMH.shape[1]) < num_rows_e[:, None]
    scale = dispatch_output.hidden_states_scale
    ids_N1 = is_there_eM.nonzero()[:, :1]
    there = SimpleNamespace(
        hidden_states=rows_eMH[is_there_eM],
        hidden_states_scale=None if scale is None else scale[is_there_eM],
        topk_ids=ids_N1,
        topk_weights=torch.ones(ids_N1.shape),
    )
    done_NH = run(there, quant_info, config)
    out_eMH = done_NH.new_full(rows_eMH.shape, float("nan"))
    out_eMH[is_there_eM] = done_NH
    return out_eMH


def _run(dispatch_output: Any, quant_info: Any, config: MoeRunnerConfig) -> torch.Tensor:
    return run_experts(
        dispatch_output.hidden_states,
        dispatch_output.topk_ids,
        dispatch_output.topk_weights,
        quant_info.w13_weight,
        quant_info.w2_weight,
        config.activation,
    )


def _run_fp8(dispatch_output: Any, quant_info: Any, config: MoeRunnerConfig) -> torch.Tensor:
    if config.activation != "silu" or quant_info.block_shape != [GROUP, GROUP]:
        raise NotImplementedError(
            f"stand-in: activation {config.activation}, block_shape {quant_info.block_shape}: in "
            f"float8 only silu with blocks of {GROUP}x{GROUP} runs on CPU"
        )
    return run_experts_fp8(
        dispatch_output.hidden_states,
        dispatch_output.hidden_states_scale,
        dispatch_output.topk_ids,
        dispatch_output.topk_weights,
        Fp8Experts(
            w13_eJH=quant_info.w13_weight,
            w13_scale=quant_info.w13_scale,
            w2_eHI=quant_info.w2_weight,
            w2_scale=quant_info.w2_scale,
        ),
    )


def moe_forward_native(
    layer: Any,
    x: torch.Tensor,
    topk_output: StandardTopKOutput,
    moe_runner_config: MoeRunnerConfig,
) -> torch.Tensor:
    """SGLang's function of the same name, with -1 as "not on this rank" as EP needs it."""
    check_supported(moe_runner_config)
    if getattr(layer, "w13_weight_bias", None) is not None:
        raise NotImplementedError("stand-in: experts with a bias do not run on CPU")
    return run_experts(
        x,
        topk_output.topk_ids,
        topk_output.topk_weights,
        layer.w13_weight,
        layer.w2_weight,
        moe_runner_config.activation,
    )


def check_supported(config: MoeRunnerConfig) -> None:
    """Refuse expert variants that `run_experts` would compute wrongly. NotImplementedError."""
    unsupported = {
        "activation": None if config.activation in ACTIVATIONS else config.activation,
        "is_gated": None if config.is_gated else False,
        "apply_router_weight_on_input": config.apply_router_weight_on_input or None,
        "no_combine": config.no_combine or None,
        "gemm1_alpha": config.gemm1_alpha,
        "swiglu_limit": config.swiglu_limit,
    }
    found = {name: value for name, value in unsupported.items() if value is not None}
    if found:
        raise NotImplementedError(f"stand-in: experts with {found} do not run on CPU")
