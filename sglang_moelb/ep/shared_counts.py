"""Memory that the serving process and its controller both map: the counts of a pass in each slot.

The device copies into a slot, the controller reads it there; nothing is copied by the serving
thread. The memory has no name and goes when the last of the two processes does. Light to import:
no torch.

Shape letters: S slots, R ranks, L MoE layers, E logical experts, W width of a layer's row of
counts.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Topology

NUM_STATS = 8
MAX_SLOTS, MIN_SLOTS = 32, 4
MAX_BYTES = 64 << 20  # of all slots, where the fewest allowed do not need more


class SharedCounts:
    """`stats_SR8` int64, the others int32, writable on both sides.

    `copied_SLR2` are the rows that each rank computes under the lever replicate, and its copies.

    A slot belongs to the serving process until it has told of the pass in it, and then to the
    controller until it has answered.
    """

    def __init__(self, file: int, topology: Topology, num_slots: int) -> None:
        """Map the open memory file `file`, which must be as long as `num_bytes` says."""
        self.file = file
        self.num_slots = num_slots
        self.num_bytes = num_bytes(topology, num_slots)
        self._memory = mmap.mmap(file, num_bytes(topology, num_slots))
        stats_shape = (num_slots, topology.num_ranks, NUM_STATS)
        self.stats_SR8 = np.ndarray(stats_shape, np.int64, self._memory)
        self.counts_SRLW = np.ndarray(
            (num_slots, topology.num_ranks, topology.num_layers, _width(topology)),
            np.int32,
            self._memory,
            offset=self.stats_SR8.nbytes,
        )
        self.low_SLE = np.ndarray(
            (num_slots, topology.num_layers, topology.num_experts),
            np.int32,
            self._memory,
            offset=self.stats_SR8.nbytes + self.counts_SRLW.nbytes,
        )
        self.copied_SLR2 = np.ndarray(
            (num_slots, topology.num_layers, topology.num_ranks, 2),
            np.int32,
            self._memory,
            offset=self.stats_SR8.nbytes + self.counts_SRLW.nbytes + self.low_SLE.nbytes,
        )

    @classmethod
    def create(cls, topology: Topology) -> SharedCounts:
        """New memory with as many slots as are sensible for `topology`."""
        num_slots = MAX_BYTES // num_bytes(topology, 1)
        num_slots = max(MIN_SLOTS, min(num_slots, MAX_SLOTS))
        file = os.memfd_create("moelb-counts")
        os.truncate(file, num_bytes(topology, num_slots))
        return cls(file, topology, num_slots)


def num_bytes(topology: Topology, num_slots: int) -> int:
    """Bytes of `num_slots` slots."""
    num_words = topology.num_ranks * topology.num_layers * _width(topology)
    num_words += topology.num_layers * (topology.num_experts + 2 * topology.num_ranks)
    return num_slots * (8 * topology.num_ranks * NUM_STATS + 4 * num_words)


def _width(topology: Topology) -> int:
    return row_width(topology.num_experts, with_histogram=False)
