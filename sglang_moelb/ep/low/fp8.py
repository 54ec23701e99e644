"""Weights and rows in float8 e4m3 with 128x128 and 1x128 scales, run by SGLang's DeepGEMM runner.

The runner takes its precision from the dtype of the weights that it is given with each call, so a
layer is switched by giving it other weights and rows.

Shape letters: e local experts of this rank, N received rows, M rows that DeepEP has room for in an
expert in low latency, H hidden size, J = 2I gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moelb.ep.expert_rows import WEIGHTS, in_bfloat16
from sglang_moelb.kernels.convert_fp8 import convert_fp8
from sglang_moelb.kernels.quantise_rows import quantise_masked_rows, quantise_rows

NAME = "fp8"
BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Weights:
    """Both projections of a layer's local experts: e4m3 `[e, J, H]`, `[e, H, I]`, and scales."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the four tensors."""
        return sum(t.nbytes for t in (self.w13, self.w2, self.w13_scale, self.w2_scale))


def allocate(layer: Any) -> Fp8Weights:
    """Room for the low-precision weights of a layer like `layer`, filled with zeros.

    Plain tensors: SGLang's expert moves collect every parameter with as many rows as experts.
    """
    w13, w2 = layer.w13_weight, layer.w2_weight
    return Fp8Weights(
        w13=torch.zeros(w13.shape, dtype=torch.float8_e4m3fn, device=w13.device),
        w2=torch.zeros(w2.shape, dtype=torch.float8_e4m3fn, device=w2.device),
        w13_scale=_scales(w13),
        w2_scale=_scales(w2),
    )


def convert(
    layer: Any, into: Fp8Weights, wanted_e: torch.Tensor, num_programs: int | None = None
) -> None:
    """Convert the wanted experts of `layer` in one launch on the current stream; no host sync.

    At most `num_programs` SMs are busy with it.
    """
    convert_fp8(
        [in_bfloat16(layer.w13_weight.data), in_bfloat16(layer.w2_weight.data)],
        [into.w13, into.w2],
        [into.w13_scale, into.w2_scale],
        wanted_E=wanted_e,
        num_programs=num_programs,
    )


def store(layer: Any, expert: int, into: Fp8Weights) -> None:
    """Write local expert `expert` of `layer` into the one place of `into`; no host sync.

    On the current stream.
    """
    one = SimpleNamespace(**{name: getattr(layer, name)[expert : expert + 1] for name in WEIGHTS})
    convert(one, into, torch.ones(1, dtype=torch.int32, device=into.w13.device))


def quantised(dispatch_output: Any) -> Any:
    """The received rows in float8 with their scales, in a copy of `dispatch_output`."""
    q_NH, scale = quantise_rows(in_bfloat16(dispatch_output.hidden_states))
    return dispatch_output._replace(hidden_states=q_NH, hidden_states_scale=scale)


def quantised_masked(dispatch_output: Any) -> Any:
    """As `quantised`, of a low-latency dispatch: of each expert the rows that have arrived."""
    q_eMH, scale = quantise_masked_rows(
        in_bfloat16(dispatch_output.hidden_states), dispatch_output.masked_m
    )
    return dispatch_output._replace(hidden_states=q_eMH, hidden_states_scale=scale)


def run(layer: Any, dispatch_output: Any, weights: Fp8Weights) -> Any:
    """The experts of `layer` on rows from `quantised` or `quantised_masked`; SGLang frees those.

    bfloat16 rows out.
    """
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo

    quant_info = DeepGemmMoeQuantInfo(
        w13_weight=weights.w13,
        w2_weight=weights.w2,
        use_fp8=True,
        w13_scale=weights.w13_scale,
        w2_scale=weights.w2_scale,
        block_shape=[BLOCK, BLOCK],
    )
    return layer.quant_method.runner.run(dispatch_output, quant_info)


def _scales(weight: torch.Tensor) -> torch.Tensor:
    num_experts, num_rows, num_columns = weight.shape
    shape = (num_experts, num_rows // BLOCK, num_columns // BLOCK)
    return torch.zeros(shape, dtype=torch.float32, device=weight.device)
