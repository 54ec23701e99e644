"""What the plan says of this rank's experts, brought to the host without a wait of its own.

DeepEP's dispatch blocks the host until rows have been counted on the device, behind all that its
stream held before. A copy that was enqueued before it is there when it returns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


class HostFlags:
    """One flag a local expert; `num_waits` counts the reads that came before the copy."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._host_e = torch.zeros(num_experts, dtype=torch.int32, pin_memory=self._is_cuda)
        self._copied = torch.cuda.Event() if self._is_cuda else None
        self.num_waits = 0

    def send(self, flags_e: torch.Tensor) -> None:
        """Enqueue the copy on the current stream; the flags sent before must have been read."""
        self._host_e.copy_(flags_e, non_blocking=True)
        if self._copied:
            self._copied.record()

    def read(self) -> NDArray[np.bool_]:
        """The flags last sent; blocks only if the device has not come so far."""
        if self._copied and not self._copied.query():
            self.num_waits += 1
            self._copied.synchronize()
        flags_e: NDArray[np.bool_] = self._host_e.numpy() != 0
        return flags_e
