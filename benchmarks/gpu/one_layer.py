"""MoE layers on one device without a server: SGLang's own runner, its weights, and rows for it.

On CUDA the experts run through SGLang's `MoeRunner` and DeepGEMM, as in a server; on the host
through the stand-in's reference. The lever takes such layers as it takes those of a model.

Shape letters: E local experts, N received rows, K top-k columns, H hidden size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

ALIGNMENT = 128  # rows to which DeepEP rounds up the counts, as DeepGEMM wants them


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """Shapes of the local experts; the defaults are a rank of four of Qwen3-30B-A3B."""

    num_experts: int = 32
    hidden: int = 2048
    inner: int = 768
    topk: int = 8

    @property
    def weight_bytes(self) -> int:
        """Both projections of all experts in bfloat16."""
        return 2 * self.num_experts * 3 * self.hidden * self.inner


class RunnerMethod:
    """What the lever uses of SGLang's `UnquantizedFusedMoEMethod`."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The experts at the precision of the model."""
        from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo

        quant_info = DeepGemmMoeQuantInfo(
            w13_weight=layer.w13_weight, w2_weight=layer.w2_weight, use_fp8=False
        )
        return self.runner.run(dispatch_output, quant_info)


def make_layer(seed: int, sizes: LayerSizes, device: torch.device) -> Any:
    """A layer with random weights such that an output is about as large as its input."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(num_rows: int, num_columns: int) -> torch.nn.Parameter:
        shape = (sizes.num_experts, num_rows, num_columns)
        weight = torch.randn(shape, generator=generator, device=device) / num_columns**0.5
        return torch.nn.Parameter(weight.bfloat16(), requires_grad=False)

    return SimpleNamespace(
        w13_weight=draw(2 * sizes.inner, sizes.hidden),
        w2_weight=draw(sizes.hidden, sizes.inner),
        quant_method=RunnerMethod(make_runner(sizes, device.type)),
        top_k=sizes.topk,
    )


@lru_cache
def make_runner(sizes: LayerSizes, device_type: str) -> Any:
    """SGLang's runner on DeepGEMM, or on the host the reference of it."""
    # DeepGEMM would else compile every size that a server may see before its first call.
    os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"
    close_torchvision_gap()
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    config = MoeRunnerConfig(
        num_experts=sizes.num_experts,
        num_local_experts=sizes.num_experts,
        hidden_size=sizes.hidden,
        intermediate_size_per_partition=sizes.inner,
        top_k=sizes.topk,
        params_dtype=torch.bfloat16,
    )
    if device_type == "cuda":
        from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
        from sglang.srt.runtime_context import get_context, get_parallel

        get_context().override_server_args().install()
        get_parallel().override_permanently(tp_group=SimpleNamespace(world_size=1))
        return MoeRunner(MoeRunnerBackend.DEEP_GEMM, config)
    from sglang_moelb.ep.standin.runner_core import ReferenceRunnerCore

    core = ReferenceRunnerCore(config)
    return SimpleNamespace(run=lambda rows, quant: core.run_from_dispatch(rows, quant, config))


def now_s(device: torch.device) -> float:
    """When the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arm_times_ms(
    arms: dict[str, Callable[[int], torch.Tensor]],
    device: torch.device,
    num_layers: int,
    num_rounds: int,
) -> dict[str, list[float]]:
    """Milliseconds a layer of the slowest rank, by arm; every second round in reverse."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(num_rounds):
        for name in arms if index % 2 == 0 else reversed(arms):
            dist.barrier()
            begun_s = now_s(device)
            for number in range(num_layers):
                arms[name](number)
            ms = torch.tensor([1e3 * (now_s(device) - begun_s) / num_layers], device=device)
            dist.all_reduce(ms, op=dist.ReduceOp.MAX)
            taken[name].append(ms.item())
    return taken


def received_rows(
    seed: int, rows_e: list[int], num_columns: int, sizes: LayerSizes, device: torch.device
) -> Any:
    """What DeepEP's dispatch would give a rank: rows, their local experts, and counts.

    Args:
        rows_e: rows of each local expert.
        num_columns: local experts of a received row, at most top-k; the other columns are -1, as
            where a token's other experts live on other ranks. The last rows may have fewer.
    """
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    generator = torch.Generator().manual_seed(seed)
    # Selections in the order of the experts, cut into columns: no row meets an expert twice,
    # as neighbours of a row are `num_rows` selections apart.
    experts = torch.repeat_interleave(torch.arange(len(rows_e)), torch.tensor(rows_e))
    num_rows = max(-(-len(experts) // num_columns), max(rows_e, default=0))
    ids_NK = torch.full((num_columns * num_rows,), -1, dtype=torch.int64)
    ids_NK[: len(experts)] = experts
    ids_NK = ids_NK.view(num_columns, num_rows).T[torch.randperm(num_rows, generator=generator)]
    padding = torch.full((num_rows, sizes.topk - num_columns), -1, dtype=torch.int64)
    ids_NK = torch.cat([ids_NK, padding], dim=1).contiguous().to(device)
    on_device = torch.Generator(device).manual_seed(seed)
    x_NH = torch.randn(num_rows, sizes.hidden, generator=on_device, device=device).bfloat16()
    weights_NK = torch.rand(num_rows, sizes.topk, generator=on_device, device=device)
    return DeepEPNormalDispatchOutput(
        hidden_states=x_NH,
        hidden_states_scale=None,
        topk_ids=ids_NK,
        topk_weights=weights_NK.where(ids_NK >= 0, 0.0),
        num_recv_tokens_per_expert=[-(-n // ALIGNMENT) * ALIGNMENT for n in rows_e],
    )


def copied(dispatch_output: Any) -> Any:
    """`dispatch_output` with rows of its own, as SGLang's runner frees those that it is given."""
    return dispatch_output._replace(hidden_states=dispatch_output.hidden_states.clone())
