"""One low expert on its way to a slot: as one run of bytes, so that any part of it can be sent.

Shape letters: none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sglang_moelb.ep.resident.formats import NAMES, LowWeights
from sglang_moelb.ep.resident.weights import (
    StoredLayer,
    copy_expert,
    only,
    quantise,
    tensors_of,
)
from sglang_moelb.placement import LayerLayout

ALIGNMENT = 16  # bytes; of float32 views, and of the checksum's words
SUMMED_WORDS = 1 << 17  # at a time: twice 1 MiB of memory beside the run, however long it is


class Staging:
    """Room for one expert like those of `low`; the gaps between its tensors stay zero."""

    def __init__(self, low: LowWeights) -> None:
        like = [tensor[:1] for tensor in tensors_of(low)]
        starts, total = [], 0
        for tensor in like:
            starts.append(total)
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.bytes = torch.zeros(total, dtype=torch.uint8, device=low.w13.device)
        self.weights = replace(
            low,
            **{
                name: self.bytes[start : start + tensor.nbytes].view(tensor.dtype).view_as(tensor)
                for name, start, tensor in zip(NAMES, starts, like, strict=True)
            },
        )

    @property
    def num_bytes(self) -> int:
        """Length of the run."""
        return self.bytes.numel()


def prepare(
    staging: Staging, layer: Any, stored: StoredLayer, layout: LayerLayout, rank: int, expert: int
) -> None:
    """Write the low bytes of `expert`, whose original is on this `rank`, to `staging`."""
    if expert in layout.high[rank]:
        quantise(layer, layout.high[rank].index(expert), staging.weights)
        return
    assert stored.low is not None
    copy_expert(staging.weights, only(stored.low, layout.low[rank].index(expert)))


def checksum(run: torch.Tensor) -> torch.Tensor:
    """A sum over a run of bytes, int64 without dimensions, where it is; no sync.

    Eight bytes a word, each times an odd weight of its own, modulo 2^64. So a change of one word is
    always found, and words that changed places are, but for chance. Ours.
    """
    words = run.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=run.device)
    for start in range(0, words.numel(), SUMMED_WORDS):
        part = words[start : start + SUMMED_WORDS]
        first, end = 2 * start + 1, 2 * (start + part.numel())
        total += torch.arange(first, end, 2, dtype=torch.int64, device=run.device).mul_(part).sum()
    return total
