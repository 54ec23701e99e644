"""Start with a placement file: whether it fits this server, its weights, and its memory.

Runs when the model has been loaded, before SGLang sizes its KV cache.

Shape letters: L MoE layers.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_moelb.config import Config
from sglang_moelb.ep.dispatchers import dispatchers_of
from sglang_moelb.ep.low import attach as low
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.formats import FORMATS, format_of
from sglang_moelb.ep.resident.masked import run_masked, some_masked_rows
from sglang_moelb.ep.resident.move import Mover
from sglang_moelb.ep.resident.refusals import placement_refusal
from sglang_moelb.ep.resident.weights import StoredLayer, high_bytes, store
from sglang_moelb.ep.unfit import LOW_LATENCY
from sglang_moelb.ep.weight_updates import refuse_updates
from sglang_moelb.placement import (
    LayerLayout,
    Placement,
    PlacementError,
    layout,
    load,
    num_slots_of,
)
from sglang_moelb.types import Topology

logger = logging.getLogger("sglang_moelb")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMemory:
    """Bytes of all experts' weights on this rank, before and after."""

    before: int = 0
    after: int = 0


def attach_resident(
    model_runner: Any, config: Config, topology: Topology, rank: int, group: Any
) -> tuple[ResidentExperts | None, ExpertMemory]:
    """The resident copies of this rank, or None without `resident.placement`; and the memory.

    Ends the process where the placement cannot be used. Every rank of the EP `group` must come here
    with the same configuration.
    """
    path = config.resident.placement
    if not path:
        return None, ExpertMemory()
    layers = low.expert_layers(model_runner.model)
    placement = _same_placement(path, group.cpu_group)
    num_slots = num_slots_of(placement.layers, placement.sizes.num_ranks)
    refusal = placement_refusal(
        placement, num_slots, topology, layers, config, model_runner.server_args
    )
    if refusal:
        what, why = refusal
        sys.exit(
            f"sglang_moelb: resident.placement {path} cannot be used: {what}: {why}. Or start "
            "without resident.placement."
        )
    layouts_L = [layout(layer, topology, num_slots) for layer in placement.layers]
    before, low_format = high_bytes(layers), FORMATS[placement.format]
    stored_L = [
        store(layer, place, rank=rank, group=group.device_group, low_format=low_format)
        for layer, place in zip(layers, layouts_L, strict=True)
    ]
    refuse_updates(
        layers[0],
        "resident.placement",
        f"experts lie in other places than SGLang loads them into, and some in {low_format.NAME}",
    )
    resident = ResidentExperts(layers, stored_L, _widened(layouts_L, config, topology), rank=rank)
    if config.resident.recalibrate:
        resident.mover = Mover(
            layers, stored_L, layouts_L, placement.layers, resident, topology, rank,
            group.device_group,
        )  # fmt: skip
    memory = _memory(before, layers, stored_L, resident.mover)
    if memory.after > before:
        sys.exit(
            f"sglang_moelb: resident.placement {path}: experts take {memory.after} bytes, {before} "
            "before: the placement is of another model, or leaves no room for the expert that "
            "resident.recalibrate has on its way; calibrate with a lower --budget"
        )
    _send_to_places(layers, topology.num_ranks * layouts_L[0].num_places)
    if layers[0].w13_weight.is_cuda:
        torch.cuda.empty_cache()  # SGLang sizes the KV cache from what the device has free
        _warm_up(layers[0], stored_L[0], group)
    _log(path, stored_L[0], low_format.NAME, memory)
    return resident, memory


def _log(path: str, stored: StoredLayer, name: str, memory: ExpertMemory) -> None:
    logger.info(
        "sglang_moelb: resident placement %s: in each layer %d experts of this rank high and %d "
        "places low in %s; its experts take %.1f MiB, before %.1f MiB",
        path,
        stored.num_high,
        stored.num_low,
        name,
        memory.after / (1 << 20),
        memory.before / (1 << 20),
    )


def _send_to_places(layers: Sequence[Any], num_physical: int) -> None:
    """Let DeepEP send to all places of all ranks, alike in all layers."""
    for layer in layers:
        for mode in _modes(layer):
            mode.num_experts = num_physical


def _memory(
    before: int, layers: Sequence[Any], stored_L: Sequence[StoredLayer], mover: Mover | None
) -> ExpertMemory:
    after = high_bytes(layers) + _low_bytes(stored_L) + (mover.num_bytes if mover else 0)
    return ExpertMemory(before=before, after=after)


def _widened(
    layouts_L: Sequence[LayerLayout], config: Config, topology: Topology
) -> Sequence[LayerLayout]:
    """`layouts_L` with room for a copy of every expert on every rank, where replicas may move."""
    if not config.resident.recalibrate:
        return layouts_L
    return [
        replace(
            one,
            copies_EC=np.pad(
                one.copies_EC,
                ((0, 0), (0, topology.num_ranks - one.copies_EC.shape[1])),
                constant_values=-1,
            ),
        )
        for one in layouts_L
    ]


def _same_placement(path: str, group: dist.ProcessGroup) -> Placement:
    """The placement that every rank has read for itself; ends all ranks where they differ.

    Before any other check, which may end one rank and leave the others in this collective.
    """
    try:
        placement = load(Path(path))
        mine, error = hashlib.sha256(placement.to_json()).hexdigest(), None
    except PlacementError as raised:
        mine, error = "unreadable", raised
    found: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    if error is not None:
        sys.exit(f"sglang_moelb: resident.placement: {error}")
    if len(set(found)) > 1:
        sys.exit(
            f"sglang_moelb: resident.placement {path} cannot be used: ranks have read different "
            "files, or some none: give all hosts the same one. Or start without "
            "resident.placement."
        )
    return placement


def _low_bytes(stored_L: Sequence[StoredLayer]) -> int:
    return sum(stored.low.num_bytes for stored in stored_L if stored.low is not None)


def _modes(layer: Any) -> list[Any]:
    """The parts of a layer's dispatcher for DeepEP's normal mode and for low latency, as it has.

    DeepEP's buffer, which both share, is made for the `num_experts` of that which comes first.
    """
    names = ("_normal_dispatcher", LOW_LATENCY)
    modes = [getattr(one, name, None) for one in dispatchers_of(layer) for name in names]
    return [mode for mode in modes if mode is not None]


def _warm_up(layer: Any, stored: StoredLayer, group: Any) -> None:
    """Compile both precisions on all ranks before requests come, as `ep.low.attach.warm_up` does.

    DeepGEMM compiles for a number of experts, which is the same in all layers and on all ranks, and
    for low latency other kernels than for prefill. Marlin is compiled once for all.
    """
    for mode in _modes(layer):
        if mode.dispatch_mode.is_low_latency():
            places = stored.num_high + stored.num_low
            run_masked(layer, some_masked_rows(layer, mode, places), stored)
            continue
        layer.quant_method.apply(layer=layer, dispatch_output=low.some_rows(layer))
        if stored.low is not None:
            low_format = format_of(stored.low)
            rows = low_format.quantised(low.some_rows(layer, stored.num_low))
            low_format.run(layer, rows, stored.low)
    torch.cuda.synchronize()
    dist.barrier(group=group.cpu_group)
