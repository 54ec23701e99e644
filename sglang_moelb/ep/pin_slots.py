"""Lets the device write into memory that the leader shares with its controller process."""

from __future__ import annotations

import torch

from sglang_moelb.ep.records import Slot
from sglang_moelb.ep.shared_counts import SharedCounts


def pin_slots(shared: SharedCounts, slots: list[Slot]) -> str:
    """Let the device copy into the memory without a host sync; why that failed, or "".

    Runs on the host, once, in a process that uses CUDA.
    """
    num_bytes = shared.num_bytes
    # The stats of the first slot are where the memory begins.
    problem = torch.cuda.cudart().cudaHostRegister(slots[0].stats_R8.data_ptr(), num_bytes, 0)
    return f"cudaHostRegister of {num_bytes} bytes failed: {problem}" if int(problem) else ""
