"""The small types of `deep_ep` 2.1: configuration, events, and the handle of a dispatch (host)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Config:
    """Tuning parameters of DeepEP's kernels: accepted and checked, without effect here."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms < 0 or self.num_sms % 2:
            raise ValueError(f"num_sms={self.num_sms}: must be even and not negative")
        if self.num_max_nvl_chunked_send_tokens >= self.num_max_nvl_chunked_recv_tokens:
            raise ValueError(
                f"num_max_nvl_chunked_send_tokens={self.num_max_nvl_chunked_send_tokens}: must be "
                f"below num_max_nvl_chunked_recv_tokens={self.num_max_nvl_chunked_recv_tokens}"
            )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of NVLink buffer: none is needed on the host."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of RDMA buffer: none is needed on the host."""
        return 0


@dataclass(frozen=True, slots=True)
class EventHandle:
    """A point in the order of work. Host work is done when it returns, so it holds nothing."""

    def current_stream_wait(self) -> None:
        """Return at once: everything before the event has finished."""


@dataclass(slots=True)
class EventOverlap:
    """An event to wait for; `event` is None where the caller asked for a blocking call."""

    event: EventHandle | None = None
    extra_tensors: tuple[torch.Tensor, ...] | None = None

    def current_stream_wait(self) -> None:
        """Wait for the event; a `ValueError` where there is none, as on a GPU."""
        if self.event is None:
            raise ValueError("there is no event to wait for: the call had async_finish=False")
        self.event.current_stream_wait()


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """What `combine` needs to bring rows home: made by `dispatch`, opaque to the caller.

    `sent_tokens`: source token of each sent row, ordered by destination rank, then token.
    `num_sent`, `num_received`: rows per peer rank. `num_tokens`: T at dispatch.
    """

    sent_tokens: torch.Tensor
    num_sent: list[int]
    num_received: list[int]
    num_tokens: int
