"""SGLang's Marlin: grouped GEMMs of bfloat16 rows on MXFP4 weights, as its own MXFP4 models run.

Called below `fused_marlin_moe`, which draws a row's place in a block by atomics, so that its sums
could differ between two calls, and takes blocks of 64 rows wherever there is room for as many.
The kernel is compiled at its first call with `nvcc`.

Shape letters: e experts, S rows, M rows that one has room for, H hidden size, J = 2I gate and up,
I expert size, N output features, K features.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_moelb.kernels.lay_blocks import Blocks

GROUP = 32  # weights that share a scale
MULTIPLE = 128  # of hidden and expert size: a tile of the kernel, of which K takes 64 and N 128
HOPPER = (9, 0)
Stored = tuple[torch.Tensor, torch.Tensor]  # what `repacked` and `permute` gave of all experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Symbol:
    """A function of SGLang that is called here, with the parameters that it must have."""

    module: str
    name: str
    params: tuple[str, ...]

    def resolved(self) -> Callable[..., Any]:
        """The function."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found


GEMM = Symbol(
    module="sglang.kernels.ops.moe.moe_wna16_marlin",
    name="moe_wna16_marlin_gemm",
    params=(
        "a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "global_scale_or_none",
        "b_zeros_or_none", "g_idx_or_none", "perm_or_none", "workspace", "sorted_token_ids",
        "expert_ids", "num_tokens_post_padded", "topk_weights", "moe_block_size", "top_k",
        "mul_topk_weights", "is_ep", "b_q_type", "size_m", "size_n", "size_k", "is_k_full",
        "use_atomic_add", "use_fp32_reduce", "is_zp_float", "expert_ids_are_sorted",
        "zero_inactive_output", "has_inactive_prefix_count",
    ),
)  # fmt: skip
REPACK = Symbol(
    module="sglang.kernels.ops.quantization.gptq_marlin_repack",
    name="gptq_marlin_repack",
    params=("b_q_weight", "perm", "size_k", "size_n", "num_bits"),
)
MAKE_WORKSPACE = Symbol(
    module="sglang.srt.layers.quantization.marlin_utils",
    name="marlin_make_workspace",
    params=("device", "max_blocks_per_sm"),
)
ACTIVATE = Symbol(
    module="sglang.kernels.ops.activation.activation",
    name="silu_and_mul",
    params=(
        "input", "out", "expert_ids", "expert_step", "sorted_token_ids", "num_tokens_post_padded",
        "num_valid_tokens",
    ),
)  # fmt: skip
ACTIVATE_MASKED = Symbol(
    module="sglang.kernels.ops.moe.ep_moe_kernels",
    name="silu_and_mul_masked_fwd",
    params=("input", "output", "masked_m"),
)
GATHER = Symbol(
    module="sglang.kernels.ops.moe.ep_moe_kernels",
    name="ep_gather",
    params=(
        "input_tensor", "recv_topk_ids", "recv_topk_weight", "input_index", "output_tensor",
    ),
)  # fmt: skip
SYMBOLS = (GEMM, REPACK, MAKE_WORKSPACE, ACTIVATE, ACTIVATE_MASKED, GATHER)


def library_refusal() -> tuple[str, str] | None:
    """What of SGLang or of the machine is not what this format relies on; None if all is."""
    fix = "install sglang 0.5.23 with its sglang-kernel, or calibrate with --format fp8"
    for symbol in SYMBOLS:
        name = f"{symbol.module}.{symbol.name}"
        try:
            found = tuple(inspect.signature(symbol.resolved()).parameters)
        except (ImportError, AttributeError) as error:
            return f"SGLang without {name} ({error})", fix
        if found != symbol.params:
            return f"{name} with the parameters {', '.join(found)}", f"expected others; {fix}"
    try:
        _e2m1()
    except (ImportError, AttributeError) as error:
        return f"SGLang without sgl_kernel.scalar_type ({error})", fix
    if not _compiler():
        return "a host without nvcc", (
            "SGLang compiles its Marlin kernel at the first start; install the CUDA toolkit and "
            "set CUDA_HOME, or calibrate with --format fp8"
        )
    return None


def repacked(codes_NK: torch.Tensor) -> torch.Tensor:
    """One expert's codes, uint8 `[N, K/2]`, as Marlin reads them: int32 `[K/16, 2N]`.

    On a GPU. As SGLang's `prepare_moe_mxfp4_layer_for_marlin` does.
    """
    num_rows, num_columns = codes_NK.shape[0], 2 * codes_NK.shape[1]
    packed: torch.Tensor = REPACK.resolved()(
        b_q_weight=codes_NK.view(torch.int32).T.contiguous(),
        perm=torch.empty(0, dtype=torch.int32, device=codes_NK.device),
        size_k=num_columns,
        size_n=num_rows,
        num_bits=4,
    )
    return packed


def permute(scales_NK: torch.Tensor, into_KN: torch.Tensor) -> None:
    """Copy one expert's scales, e8m0 bytes `[N, K/32]`, to bytes `[K/32, N]` in Marlin's order.

    What SGLang's `marlin_permute_scales` and `mxfp4_marlin_process_scales` do by lists of indices,
    which would wait for the device: of 64 features every eighth together, then of each four the
    middle two exchanged. One launch.
    """
    num_groups, num_rows = into_KN.shape
    ordered = scales_NK.view(-1, 2, 2, 2, 8, num_groups).permute(5, 0, 4, 1, 3, 2)
    into_KN.view(num_groups, num_rows // 64, 8, 2, 2, 2).copy_(ordered)


def run_marlin(
    rows_SH: torch.Tensor,
    num_rows_e: torch.Tensor,
    blocks: Blocks,
    *,
    block: int,
    room: int,
    w13: Stored,
    w2: Stored,
) -> torch.Tensor:
    """Experts on rows that lie expert by expert, `[S, H]` bfloat16; rows of no expert are anything.

    `blocks` are those of `num_rows_e`, `block` and `room`, see `kernels.lay_blocks`. No host sync,
    can be captured.
    """
    # Of its own in each call, as in SGLang: graphs must not share the locks that are in it.
    workspace = MAKE_WORKSPACE.resolved()(rows_SH.device, max_blocks_per_sm=4)
    gate_up_SJ = _multiplied(rows_SH, w13, blocks, block, workspace)
    num_rows, width = gate_up_SJ.shape
    act_SI = gate_up_SJ.new_empty(num_rows, width // 2)
    if room:
        by_expert = (len(num_rows_e), room, -1)
        ACTIVATE_MASKED.resolved()(gate_up_SJ.view(by_expert), act_SI.view(by_expert), num_rows_e)
    else:
        ACTIVATE.resolved()(gate_up_SJ, act_SI)
    return _multiplied(act_SI, w2, blocks, block, workspace)


def summed(
    rows_SH: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    place_NK: torch.Tensor,
) -> torch.Tensor:
    """Each row's weighted sum over its experts in float32, bfloat16 `[N, H]`; in a fixed order."""
    out_NH = rows_SH.new_empty(len(ids_NK), rows_SH.shape[1])
    GATHER.resolved()(rows_SH, ids_NK, weights_NK, place_NK, out_NH)
    return out_NH


def _multiplied(
    rows_SK: torch.Tensor,
    weights: Stored,
    blocks: Blocks,
    block: int,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """One grouped GEMM, with the flags of `fused_marlin_moe`'s first."""
    num_rows, num_columns = rows_SK.shape
    codes, scales = weights
    num_features = scales.shape[2]
    out_SN: torch.Tensor = GEMM.resolved()(
        rows_SK,
        rows_SK.new_empty(num_rows, num_features),
        codes,
        None,
        scales.view(torch.float8_e8m0fnu),
        None,
        None,
        None,
        None,
        workspace,
        blocks.rows,
        blocks.experts,
        blocks.used,
        torch.empty(0, dtype=torch.float32, device=rows_SK.device),  # weights, not multiplied in
        moe_block_size=block,
        top_k=1,
        mul_topk_weights=False,
        is_ep=False,
        b_q_type=_e2m1(),
        size_m=num_rows,
        size_n=num_features,
        size_k=num_columns,
        is_k_full=True,
        use_atomic_add=False,
        use_fp32_reduce=True,
        is_zp_float=False,
        expert_ids_are_sorted=True,
        has_inactive_prefix_count=True,
    )
    return out_SN


def _e2m1() -> Any:
    from sgl_kernel.scalar_type import scalar_types

    return scalar_types.float4_e2m1f


def _compiler() -> str:
    """Path of `nvcc` as SGLang looks for it, or ""."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    return shutil.which("nvcc") or (str(beside) if beside and beside.is_file() else "")
