"""What keeps a server from the placement that it was given, by flag or part, and the fix.

A function returns the two parts of the message, what and why with the fix, or None where nothing
is in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_moelb.config import Config
from sglang_moelb.ep.expert_rows import MAX_LOCAL_EXPERTS
from sglang_moelb.ep.resident.formats import format_refusal
from sglang_moelb.placement import Placement
from sglang_moelb.stored_formats import LOW_BYTES
from sglang_moelb.types import Topology

Refusal = tuple[str, str] | None


def placement_refusal(
    placement: Placement,
    num_slots: int,
    topology: Topology,
    layers: Sequence[Any],
    config: Config,
    server_args: Any,
) -> Refusal:
    """The first thing that keeps these `layers` of a server from `placement`."""
    return (
        _misfit(placement, topology, layers)
        or _server_refusal(server_args)
        or format_refusal(placement.format, layers)
        or _dtype_refusal(placement, layers[0])
        or _places_refusal(topology.experts_per_rank + num_slots)
        or _moves_refusal(config, num_slots, server_args)
    )


def _misfit(
    placement: Placement, topology: Topology, layers: Sequence[Any]
) -> Refusal:
    if placement.sizes.topology != topology:
        return f"it is for {placement.sizes.topology}", f"this server has {topology}"
    one = layers[0]
    num_weights = one.w13_weight[0].numel() + one.w2_weight[0].numel()
    num_bytes = LOW_BYTES[placement.format](num_weights)
    if placement.expert_bytes.low != num_bytes:
        return (
            f"it is for experts of {placement.expert_bytes.low} bytes in {placement.format}",
            f"those of this model take {num_bytes}; calibrate with this checkpoint",
        )
    return None


def _server_refusal(server_args: Any) -> Refusal:
    for flag, given in (
        ("--enable-memory-saver", server_args.enable_memory_saver),
        ("--cpu-offload-gb", server_args.cpu_offload_gb),
    ):
        if given:
            return flag, "the experts' memory is replaced at start and stays; leave the flag out"
    if server_args.enable_single_batch_overlap:
        return (
            "--enable-single-batch-overlap",
            "it overlaps the combine with one grouped run of all experts, and here are two; leave "
            "the flag out",
        )
    if server_args.expert_distribution_recorder_mode:
        return (
            f"--expert-distribution-recorder-mode {server_args.expert_distribution_recorder_mode}",
            "it counts as many experts as the model has, and copies are more; leave the flag out",
        )
    return None


def _dtype_refusal(placement: Placement, layer: Any) -> Refusal:
    """Experts smaller than the file counts: its copies would cost more than its cold experts free.

    Larger ones free more, so they fit.
    """
    num_bytes = layer.w13_weight[0].nbytes + layer.w2_weight[0].nbytes
    if num_bytes >= placement.expert_bytes.high:
        return None
    dtype = str(layer.w13_weight.dtype).removeprefix("torch.")
    return (
        f"it is for experts of {placement.expert_bytes.high} bytes at high precision",
        f"those of this server take {num_bytes} in {dtype}; start with the --dtype of the "
        f"checkpoint that was calibrated, or calibrate with a {dtype} checkpoint",
    )


def _places_refusal(num_places: int) -> Refusal:
    if num_places <= MAX_LOCAL_EXPERTS:
        return None
    return (
        f"{num_places} experts on a rank",
        f"DeepEP sends to at most {MAX_LOCAL_EXPERTS}; calibrate with fewer --slots or more ranks",
    )


def _moves_refusal(
    config: Config, num_slots: int, server_args: Any
) -> Refusal:
    if not config.resident.recalibrate:
        return None
    why = None
    if not num_slots:
        why = (
            "the file has no replicas, so there is no slot to move one to; leave it out, or "
            "calibrate with --slots 1 or more"
        )
    elif server_args.disaggregation_mode == "decode":
        why = "moves follow the load of prefills, which the decode role has none of; leave it out"
    return ("resident.recalibrate True", why) if why else None
