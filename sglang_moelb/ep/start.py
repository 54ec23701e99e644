"""Attach to a loaded model: find its MoE layers, refuse what is not supported, start the clocks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from sglang_moelb.config import Config, trace_folder
from sglang_moelb.ep import install, points, seams
from sglang_moelb.ep.controller_link import ControllerError, ControllerLink
from sglang_moelb.ep.dispatchers import dispatchers_of
from sglang_moelb.ep.exchange import LEADER, Agreement, exchange_for
from sglang_moelb.ep.low.attach import attach_downgrade
from sglang_moelb.ep.memory import with_experts, with_replicas
from sglang_moelb.ep.metrics import Metrics
from sglang_moelb.ep.modality import RowWindow
from sglang_moelb.ep.observe import warm_up
from sglang_moelb.ep.replicas.attach import attach_replicas
from sglang_moelb.ep.resident.attach import attach_resident
from sglang_moelb.ep.resident.moving import MovingAgreement
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.token_trace import TokenTrace, token_trace_of
from sglang_moelb.types import Topology

logger = logging.getLogger("sglang_moelb")

SUPPORTED = (
    "Qwen3MoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiVLForConditionalGeneration",
)
SCORINGS = ("softmax", "sigmoid")


def attach_to(model_runner: Any, config: Config) -> None:
    """Build the runtime of this process and let the seams drive it.

    Ends the process, naming what it found and what would be right, where it cannot balance.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    seat = _seat(model_runner, parallel)
    group = parallel.moe_ep_group
    one_host = model_runner.server_args.nnodes == 1
    resident, experts = attach_resident(model_runner, config, seat.topology, seat.rank, group)
    config, replicate, replicas_bytes = attach_replicas(
        model_runner, config, seat.topology, seat.rank, group
    )
    config, downgrade, memory = attach_downgrade(model_runner, config, seat.rank, group)
    memory = with_replicas(memory, replicas_bytes, model_runner)
    memory = with_experts(memory, experts.before, experts.after, model_runner)
    memory.log()
    tokens = token_trace_of(seat, config)
    warm_up(seat.topology, seat.device)
    controller = _controller(seat, config, tokens) if seat.rank == LEADER else None
    agreement = Agreement(group.cpu_group, one_host=one_host)
    mover = resident.mover if resident else None
    runtime = Runtime(
        seat,
        config,
        MovingAgreement(agreement, mover, resident) if resident and mover else agreement,
        exchange_for(
            group.device_group,
            num_layers=seat.topology.num_layers,
            num_experts=seat.topology.num_experts,
            device=seat.device,
            one_host=one_host,
        ),
        controller,
        tokens,
        downgrade,
        replicate,
        memory,
        resident,
    )
    points.attach(runtime)
    logger.info(
        "sglang_moelb: mode %s, %d MoE layers, %d experts on %d ranks, seams as %s",
        config.mode,
        seat.topology.num_layers,
        seat.topology.num_experts,
        seat.topology.num_ranks,
        seat.form,
    )


def _controller(seat: Seat, config: Config, tokens: TokenTrace | None) -> ControllerLink:
    """The controller process of the leader; ends this process where it cannot begin."""
    metrics = Metrics.if_enabled()
    try:
        controller = ControllerLink(
            seat.topology,
            config,
            rank=seat.rank,
            device=seat.device,
            has_metrics=metrics is not None,
            trace=trace_folder(),
        )
    except ControllerError as error:
        sys.exit(f"sglang_moelb: {error}")
    if metrics:
        metrics.watch(controller, config)
        metrics.follow("tokens", tokens.background if tokens else None)
    return controller


def _seat(model_runner: Any, parallel: Any) -> Seat:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    architecture = model_runner.model_config.hf_config.architectures[0]
    if architecture not in SUPPORTED:
        _refuse(f"model {architecture}", f"supported are {', '.join(SUPPORTED)}")
    experts = [m for m in model_runner.model.modules() if isinstance(m, FusedMoE)]
    if not experts:
        _refuse(f"model {architecture} of this checkpoint", "it has no MoE layer to balance")
    if parallel.moe_ep_size < 2:
        _refuse(f"ep_size {parallel.moe_ep_size}", "use --tp-size 2 or more with deepep")
    routers = _routers(model_runner.model)
    scoring = tuple(_scoring(routers[id(e)], architecture) for e in experts)
    num_experts = {e.num_experts for e in experts}
    if len(num_experts) != 1 or any(e.num_fused_shared_experts for e in experts):
        _refuse(
            f"model {architecture}",
            "its MoE layers differ in size or fuse shared experts; use "
            "--disable-shared-experts-fusion",
        )
    topology = Topology(
        num_layers=len(experts),
        num_experts=num_experts.pop(),
        num_ranks=parallel.moe_ep_size,
        topk=experts[0].top_k,
    )
    _refuse_unseamed(experts)
    form = seams.form_of(install.verified_findings())
    assert form is not None
    return Seat(
        topology=topology,
        rank=parallel.moe_ep_rank,
        device=torch.device(model_runner.device),
        window=RowWindow(
            attn_tp_size=parallel.attn_tp_size, attn_tp_rank=parallel.attn_tp_rank
        ),
        layer_of_dispatcher={
            id(inner): layer
            for layer, e in enumerate(experts)
            for inner in dispatchers_of(e)
        },
        scoring=scoring,
        form=form,
    )


def _refuse_unseamed(experts: Sequence[Any]) -> None:
    """End the process where SGLang's DeepEP layer computes experts past the seam of levers.

    It does so for W4AFp8 and others that it has not moved to its runners; the first prefill would
    end the process else.
    """
    past = [one for one in experts if not getattr(one, "deprecate_flag", True)]
    if past:
        _refuse(
            f"experts of {type(past[0].quant_method).__name__}",
            "SGLang's DeepEP layer computes them by itself, not through a runner; use a bfloat16 "
            "or fp8 checkpoint with --moe-runner-backend deep_gemm",
        )


def _routers(model: torch.nn.Module) -> dict[int, Any]:
    """TopK module of each experts module, by identity: both are children of one MoE block."""
    from sglang.srt.layers.moe.topk import TopK

    routers: dict[int, Any] = {}
    for block in model.modules():
        topk = next((c for c in block.children() if isinstance(c, TopK)), None)
        experts = getattr(block, "experts", None)
        if topk is not None and experts is not None:
            routers[id(experts)] = topk
    return routers


def _scoring(router: Any, architecture: str) -> str:
    scoring = scoring_of(router.topk_config)
    if scoring not in SCORINGS:
        _refuse(f"model {architecture}", f"its router scores by {scoring}; known: {SCORINGS}")
    return scoring


def scoring_of(topk_config: Any) -> str:
    """How SGLang turns router logits into gate weights: the name of the function.

    With a correction bias its grouped top-k takes sigmoids, whatever `scoring_func` says.
    """
    if topk_config.use_grouped_topk and topk_config.correction_bias is not None:
        return "sigmoid"
    return str(topk_config.scoring_func)


def _refuse(what: str, why: str) -> None:
    sys.exit(f"sglang_moelb: {what} cannot be balanced: {why}. Or start without --moelb flags.")
