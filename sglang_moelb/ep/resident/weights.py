"""A layer's experts as a placement stores them: high ones in SGLang's parameters, low ones not.

Runs at start, on the weights that SGLang has loaded: nothing is read from the checkpoint again.

Shape letters: e local experts of this rank, J = 2I gate and up, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.ep.expert_rows import WEIGHTS
from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.resident.formats import NAMES, LowWeights, StoredFormat, format_of
from sglang_moelb.placement import LayerLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLayer:
    """What this rank holds of a layer: places 0 to num_high - 1 high, the next num_low low.

    `low` is None where nothing is low; a place without a replica holds zeros. The high weights are
    the parameters of SGLang's layer.
    """

    num_high: int
    num_low: int
    low: LowWeights | None


def store(
    layer: Any,
    layout: LayerLayout,
    *,
    rank: int,
    group: dist.ProcessGroup,
    low_format: StoredFormat = fp8,
) -> StoredLayer:
    """Replace a layer's weights by what `layout` stores on this rank; the old memory is freed.

    Collective over `group`, the EP group on the device of the weights: each replica is quantised
    where its original is and broadcast as stored, so all copies hold the same bytes. Originals of
    replicas are high, and low originals come from their own rank.
    """
    first = rank * (len(layout.copies_EC) // dist.get_world_size(group))
    high = [expert - first for expert in layout.high[rank]]
    own_low = [expert - first for expert in layout.low[rank]]
    num_low = layout.num_places - len(high)
    low = _empty(layer, num_low, low_format) if num_low else None
    for place, expert in enumerate(own_low):
        assert low is not None
        quantise(layer, expert, only(low, place))
    _take_replicas(layer, layout, low, len(own_low), rank, group, low_format)
    if own_low:
        for name in WEIGHTS:
            parameter = getattr(layer, name)
            parameter.data = parameter.data[high]  # a copy: the old memory has no owner left
    return StoredLayer(num_high=len(high), num_low=num_low, low=low)


def high_bytes(layers: Sequence[Any]) -> int:
    """Memory behind the parameters of the layers' experts, whole storages."""
    return sum(
        getattr(layer, name).untyped_storage().nbytes() for layer in layers for name in WEIGHTS
    )


def _take_replicas(
    layer: Any,
    layout: LayerLayout,
    low: LowWeights | None,
    first_place: int,
    rank: int,
    group: dist.ProcessGroup,
    low_format: StoredFormat,
) -> None:
    """Broadcast each replicated expert from its home; keep those that this rank holds."""
    per_rank = len(layout.copies_EC) // dist.get_world_size(group)
    for expert in sorted({expert for held in layout.replicas for expert in held}):
        sent = _empty(layer, 1, low_format)
        home = expert // per_rank
        if rank == home:
            quantise(layer, expert % per_rank, sent)
        for tensor in tensors_of(sent):
            # Bytes: not every backend sends float8.
            source = dist.get_global_rank(group, home)
            dist.broadcast(tensor.view(torch.uint8), source, group=group)
        if expert in layout.replicas[rank]:
            assert low is not None
            place = first_place + layout.replicas[rank].index(expert)
            copy_expert(only(low, place), sent)


def _empty(layer: Any, num_experts: int, low_format: StoredFormat) -> LowWeights:
    """Room for so many experts like those of `layer`."""
    like = SimpleNamespace(
        **{name: getattr(layer, name)[:1].expand(num_experts, -1, -1) for name in WEIGHTS}
    )
    made: LowWeights = low_format.allocate(like)
    return made


def quantise(layer: Any, expert: int, into: LowWeights) -> None:
    """Write local expert `expert` into the one place of `into`."""
    format_of(into).store(layer, expert, into)


def only(weights: LowWeights, place: int) -> LowWeights:
    """One place of `weights`, the same memory."""
    part = slice(place, place + 1)
    return replace(weights, **{name: getattr(weights, name)[part] for name in NAMES})


def copy_expert(into: LowWeights, source: LowWeights) -> None:
    """Copy one expert's bytes, on the current stream."""
    for to, tensor in zip(tensors_of(into), tensors_of(source), strict=True):
        to.view(torch.uint8).copy_(tensor.view(torch.uint8))


def tensors_of(weights: LowWeights) -> list[torch.Tensor]:
    """The four tensors, in the order of `NAMES`."""
    return [getattr(weights, name) for name in NAMES]
