"""Steps of a check as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(
    step: Callable[[], torch.Tensor],
    device_type: str,
    meet: Callable[[], Any] = torch.cuda.synchronize,
) -> Callable[[], torch.Tensor]:
    """`step` as a graph: the call replays it and returns its output's memory. On the host `step`.

    `meet` waits for the device before and after the capture, and for other ranks in the step.
    """
    if device_type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()
    meet()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
