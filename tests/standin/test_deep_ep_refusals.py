"""What the stand-in's `Buffer` refuses, and that the message names it; no process is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.ep.standin.deep_ep_buffer import Buffer, Config

HIDDEN = 8


def _lonely_buffer() -> Buffer:
    """A Buffer of rank 0 of 2 that must refuse before it communicates."""
    return Buffer(SimpleNamespace(size=lambda: 2, rank=lambda: 0))


def _dispatch_kwargs(ids: torch.Tensor, buffer: Buffer) -> dict[str, Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 4)
    return {
        "x": torch.zeros(ids.shape[0], HIDDEN),
        "topk_idx": ids,
        "topk_weights": torch.ones(ids.shape),
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"num_worst_tokens": 64}, NotImplementedError, "num_worst_tokens=64"),
        ({"handle": object()}, NotImplementedError, "handle"),
        ({"num_tokens_per_rdma_rank": torch.ones(1)}, NotImplementedError, "num_tokens_per_rdma"),
        ({"topk_weights": None}, ValueError, "topk_weights"),
        ({"topk_weights": torch.ones(3, 2, dtype=torch.bfloat16)}, ValueError, "bfloat16"),
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "int32"),
        ({"topk_idx": torch.full((3, 2), 4)}, ValueError, r"0\.\.3"),
        ({"x": torch.zeros(2, HIDDEN)}, ValueError, r"\[3, H\]"),
        ({"x": torch.zeros(3, 3)}, ValueError, "16 bytes"),
        ({"num_tokens_per_rank": torch.tensor([9, 9], dtype=torch.int32)}, ValueError, "agree"),
        ({"allocate_on_comm_stream": True}, ValueError, "previous_event"),
    ],
)
def test_dispatch_refuses_by_name_what_it_cannot_do(
    change: dict[str, Any], error: type[Exception], named: str
) -> None:
    buffer = _lonely_buffer()
    kwargs = _dispatch_kwargs(torch.tensor([[0, 1], [2, -1], [3, 0]]), buffer)
    with pytest.raises(error, match=named):
        buffer.dispatch(**{**kwargs, **change})


@pytest.mark.parametrize("kwargs", [{"num_rdma_bytes": 1}, {"enable_shrink": True}])
def test_a_buffer_refuses_modes_it_lacks(kwargs: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(kwargs))):
        Buffer(SimpleNamespace(size=lambda: 2, rank=lambda: 0), **kwargs)


def test_a_buffer_refuses_a_number_of_ranks_without_kernels() -> None:
    with pytest.raises(ValueError, match="3 EP ranks"):
        Buffer(SimpleNamespace(size=lambda: 3, rank=lambda: 0))


def test_33_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="33 columns"):
        _lonely_buffer().get_dispatch_layout(torch.zeros(1, 33, dtype=torch.int64), 64)


def test_129_experts_of_a_rank_are_refused() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    _lonely_buffer().get_dispatch_layout(ids, 256)
    with pytest.raises(ValueError, match="num_experts=258: at most 128 on each of 2 ranks"):
        _lonely_buffer().get_dispatch_layout(ids, 258)


def test_waiting_for_an_event_that_was_not_asked_for_is_an_error() -> None:
    *_, event = _lonely_buffer().get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="async_finish"):
        event.current_stream_wait()


def test_a_config_with_an_odd_number_of_sms_is_refused() -> None:
    with pytest.raises(ValueError, match="num_sms=3"):
        Config(num_sms=3)
