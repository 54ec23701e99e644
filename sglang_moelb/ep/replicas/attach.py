"""Start of the lever replicate: whether this server can have it, its memory, and its warm-up.

Runs when the model has been loaded, before SGLang sizes its KV cache.

Shape letters: L MoE layers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.config import Config
from sglang_moelb.ep.expert_rows import MAX_LOCAL_EXPERTS, WEIGHTS
from sglang_moelb.ep.low.attach import expert_layers
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.memory import MappingError, map_experts
from sglang_moelb.ep.replicas.warm_up import warm_up
from sglang_moelb.ep.unfit import (
    adapters_refusal,
    dispatch_refusal,
    offload_refusal,
    quantised_refusal,
    runner_refusal,
)
from sglang_moelb.hot_config import wants_replicas, without_replicas
from sglang_moelb.types import Topology

logger = logging.getLogger("sglang_moelb")


def attach_replicas(
    model_runner: Any, config: Config, topology: Topology, rank: int, group: Any
) -> tuple[Config, ReplicateLever | None, int]:
    """The configuration in force, the lever or None, and the bytes that its slots hold here.

    Mode replicate ends the process where it is not possible; another mode with `replicate.ready`
    goes on without it and says why.
    Every rank of the EP `group` must come here with the same configuration.
    """
    if not wants_replicas(config) or not config.replicate.slots:
        if config.mode == "replicate":
            _refuse("replicate.slots 0", "there is no room for copies; use 1 or more")
        return without_replicas(config), None, 0
    layers = expert_layers(model_runner.model)
    refusal = refusal_of(config, layers, topology, model_runner.server_args)
    if not refusal:
        try:
            experts_L = map_experts(
                layers, num_slots=config.replicate.slots, rank=rank, group=group.cpu_group
            )
        except MappingError as error:
            refusal = f"replicate.slots {config.replicate.slots}", str(error)
    if refusal:
        if config.mode == "replicate":
            _refuse(*refusal)
        logger.warning(
            "sglang_moelb: mode %s goes without replicas: %s: %s. Set replicate.ready to false to "
            "leave them out without this line.",
            config.mode,
            *refusal,
        )
        return without_replicas(config), None, 0
    device = layers[0].w13_weight.device
    lever = ReplicateLever(
        layers, experts_L, topology=topology, rank=rank, lanes=lanes_of(device)
    )
    if device.type == "cuda":
        warm_up(layers[0], experts_L, topology, rank)
        dist.barrier(group=group.cpu_group)
    return config, lever, experts_L[0].slots_bytes


def refusal_of(
    config: Config, layers: Sequence[Any], topology: Topology, server_args: Any
) -> tuple[str, str] | None:
    """What keeps this server from copying experts, and why; None where nothing does.

    Alike on all ranks: what only one of them can know, `map_experts` finds out for all.
    """
    return (
        _flag_refusal(server_args)
        or adapters_refusal("adapters are not copied with an expert")
        or quantised_refusal(layers, "their scales would have to be copied with them")
        or runner_refusal(
            layers[0], "only deep_gemm runs as many experts as it is given with each call"
        )
        or _experts_refusal(layers)
        or offload_refusal()
        or dispatch_refusal(layers[0])
        or _slots_refusal(config.replicate.slots, topology)
    )


def _flag_refusal(server_args: Any) -> tuple[str, str] | None:
    if server_args.nnodes != 1:
        return (
            f"--nnodes {server_args.nnodes}",
            "experts are copied over NVLink inside one host; use one host",
        )
    if server_args.enable_memory_saver:
        return (
            "--enable-memory-saver",
            "the experts' memory is mapped by all ranks and stays; leave the flag out",
        )
    if server_args.expert_distribution_recorder_mode:
        return (
            f"--expert-distribution-recorder-mode {server_args.expert_distribution_recorder_mode}",
            "it counts as many experts as the model has, and copies are more; leave the flag out, "
            "/moelb/status and --moelb-trace record the same",
        )
    return None


def _experts_refusal(layers: Sequence[Any]) -> tuple[str, str] | None:
    if any(getattr(one, f"{name}_bias", None) is not None for one in layers for name in WEIGHTS):
        return "experts with a bias", "it is not copied with an expert"
    weight = layers[0].w13_weight
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        return f"--dtype {weight.dtype}", "SGLang runs unquantised experts in bfloat16; use that"
    return None


def _slots_refusal(num_slots: int, topology: Topology) -> tuple[str, str] | None:
    most = MAX_LOCAL_EXPERTS - topology.experts_per_rank
    if num_slots <= most:
        return None
    fix = f"use at most {most}" if most > 0 else "use more ranks"
    return (
        f"replicate.slots {num_slots}",
        f"DeepEP sends to at most {MAX_LOCAL_EXPERTS} experts a rank, of which the model has "
        f"{topology.experts_per_rank}; {fix}",
    )


def _refuse(what: str, why: str) -> None:
    sys.exit(
        f"sglang_moelb: {what} cannot be replicated: {why}. Or start in another --moelb-mode."
    )
