"""Low-precision weights of a layer: converted into one of a few slots in turn, or resident.

A slot is written on the side lane, behind the plan that asks for it and behind the last run that
read it; the main lane waits for the writing before it reads. So neither order of the lanes can let
a run see another layer's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.low.formats import LowFormat, LowWeights
from sglang_moelb.ep.low.lanes import Event, Lanes

SM_SHARE = 3  # a third of the SMs: DeepEP's dispatch needs its own at the same time


@dataclass(slots=True)
class Slot:
    """Room for one layer, which layer it was last asked for, and when it was written and read."""

    weights: LowWeights
    layer: int = -1
    written: Event = None
    read: Event = None


class Staging:
    """The low-precision weights of all layers of this rank.

    Where every layer is resident nothing is ever converted, and there are no slots.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        *,
        num_slots: int,
        resident: Collection[int],
        lanes: Lanes,
        low_format: LowFormat = fp8,
    ) -> None:
        self.low_format = low_format
        self._layers = layers
        self._lanes = lanes
        device = layers[0].w13_weight.device
        self._num_programs = _num_sms(device) // SM_SHARE if device.type == "cuda" else None
        num_slots = num_slots if len(resident) < len(layers) else 0
        self._slots = [Slot(weights=low_format.allocate(layers[0])) for _ in range(num_slots)]
        self._resident = {layer: self._kept(layers[layer]) for layer in sorted(resident)}

    @property
    def staging_bytes(self) -> int:
        """Memory of the slots."""
        return sum(slot.weights.num_bytes for slot in self._slots)

    @property
    def resident_bytes(self) -> int:
        """Memory of the copies that are kept."""
        return sum(weights.num_bytes for weights in self._resident.values())

    def convert(self, layer: int, wanted_e: torch.Tensor) -> None:
        """Start to convert the wanted experts of `layer`; a resident layer has nothing to do."""
        if layer in self._resident:
            return
        slot = self._slot(layer)
        after = (self._lanes.mark(), slot.read) if slot.read is not None else (self._lanes.mark(),)
        with self._lanes.aside(after):
            self.low_format.convert(self._layers[layer], slot.weights, wanted_e, self._num_programs)
            slot.written = self._lanes.mark_aside()
        slot.layer = layer

    def ready(self, layer: int) -> LowWeights:
        """The weights of `layer`; the main lane waits for their conversion, the host does not."""
        if layer in self._resident:
            return self._resident[layer]
        slot = self._slot(layer)
        assert slot.layer == layer, f"slot holds layer {slot.layer}, asked for {layer}"
        self._lanes.wait(slot.written)
        return slot.weights

    def done(self, layer: int) -> None:
        """The main lane holds all that reads the weights of `layer`."""
        if layer not in self._resident:
            self._slot(layer).read = self._lanes.mark()

    def _slot(self, layer: int) -> Slot:
        return self._slots[layer % len(self._slots)]

    def _kept(self, layer: Any) -> LowWeights:
        weights: LowWeights = self.low_format.allocate(layer)
        w13 = layer.w13_weight
        every_e = torch.ones(len(w13), dtype=torch.int32, device=w13.device)
        self.low_format.convert(layer, weights, every_e)
        return weights


def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
