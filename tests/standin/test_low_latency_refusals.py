"""What the stand-in's `LowLatencyBuffer` refuses before it communicates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.ep.standin.deep_ep_low_latency import LowLatencyBuffer

HIDDEN = 8


def lonely_buffer(low_latency_mode: bool = True) -> LowLatencyBuffer:
    """A Buffer of rank 0 of 2."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    return LowLatencyBuffer(group, low_latency_mode=low_latency_mode)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"use_fp8": True}, NotImplementedError, "use_fp8=True"),
        ({"x": torch.zeros(2, HIDDEN)}, ValueError, r"\[3, H\]"),
        ({"num_max_dispatch_tokens_per_rank": 2}, ValueError, "3 tokens"),
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "int32"),
        ({"topk_idx": torch.full((3, 2), 1)}, ValueError, "twice"),
        ({"num_experts": 3}, ValueError, "num_experts=3"),
    ],
)
def test_dispatch_refuses_by_name_what_it_cannot_do(
    change: dict[str, Any], error: type[Exception], named: str
) -> None:
    kwargs = {
        "x": torch.zeros(3, HIDDEN),
        "topk_idx": torch.tensor([[0, 1], [2, -1], [-1, -1]]),
        "num_max_dispatch_tokens_per_rank": 4,
        "num_experts": 4,
        "use_fp8": False,
    }
    with pytest.raises(error, match=named):
        lonely_buffer().low_latency_dispatch(**{**kwargs, **change})


def test_low_latency_needs_a_buffer_that_was_made_for_it() -> None:
    ids = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="low_latency_mode=True"):
        lonely_buffer(False).low_latency_dispatch(torch.zeros(1, HIDDEN), ids, 4, 4, use_fp8=False)
