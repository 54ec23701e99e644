"""The low-latency mode of DeepEP's `Buffer`, in plain torch over `torch.distributed`.

Arguments, results and layout are those of `deep_ep` 2.1 without fp8; room for rows that have not
come holds NaN, so that whoever reads it is found out. Runs on the host, in eager mode only.

Shapes: T tokens of this rank, K top-k columns, R ranks, M = R * room for a rank's tokens, N = M * K
selections of all ranks, e local experts, H hidden size.
Source of the semantics: DeepEP's documentation of `Buffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_moelb.ep.standin.deep_ep_buffer import Buffer
from sglang_moelb.ep.standin.deep_ep_checks import (
    check_combine_dtype,
    check_rows,
    check_topk_idx,
    check_weights,
    refuse,
)
from sglang_moelb.ep.standin.deep_ep_types import EventHandle, EventOverlap


@dataclass(frozen=True, slots=True)
class LowLatencyHandle:
    """What `low_latency_combine` needs: made by the dispatch, opaque to the caller.

    `places_e`: of each local expert, where its rows come from, as source * room * K + token * K +
    column. `num_tokens`: T at dispatch. `room`: for tokens of a rank.
    """

    places_e: list[torch.Tensor]
    num_tokens: int
    room: int


class LowLatencyBuffer(Buffer):
    """`Buffer` with both modes."""

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of RDMA buffer: none is needed on the host."""
        return 0

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing is held between calls."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, LowLatencyHandle, EventOverlap, Callable[[], None]]:
        """Send a row for each selection to the rank of its expert. Collective.

        Args:
            x: [T, H], T at most the room. topk_idx: int64 [T, K], -1 for none.

        Returns:
            rows [e, M, H] in the dtype of x, NaN where there is none; int32 [e], how many there
            are; the handle; the event; the hook that waits for the rows.
        """
        room = num_max_dispatch_tokens_per_rank
        refuse("use_fp8", use_fp8, "use --deepep-dispatcher-output-dtype bf16")
        self._check_mode()
        check_topk_idx(topk_idx, num_experts, self.group_size)
        check_rows([x], len(topk_idx))
        if len(x) > room:
            raise ValueError(f"{len(x)} tokens, more than there is room for: {room}")
        ordered = topk_idx.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("a token selects an expert twice: an expert has room for each once")
        x_RTH = self._gathered(torch.cat([x, x.new_zeros(room - len(x), x.shape[1])]))
        ids = torch.cat([topk_idx, topk_idx.new_full((room - len(x), topk_idx.shape[1]), -1)])
        ids_N = self._gathered(ids).flatten()
        num_local = num_experts // self.group_size
        rows_eMH = x.new_full((num_local, self.group_size * room, x.shape[1]), float("nan"))
        first = self.rank * num_local
        places_e = [(ids_N == first + expert).nonzero()[:, 0] for expert in range(num_local)]
        for expert, places in enumerate(places_e):
            rows = x_RTH.flatten(0, 1)[places // topk_idx.shape[1]]
            rows_eMH[expert, : len(rows)] = rows
        counts_e = torch.tensor([len(places) for places in places_e], dtype=torch.int32)
        handle = LowLatencyHandle(places_e, len(x), room)
        return rows_eMH, counts_e, handle, _event(async_finish), _arrived

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None]]:
        """Bring rows home and add them up per token, with weights. Collective.

        Args:
            x: bfloat16 or float32 [e, M, H], as dispatched. topk_idx, topk_weights: [T, K].

        Returns:
            [T, H] in the dtype of x, summed in float32 in the order of the columns; zero for a
            token that went nowhere; the event; the hook that waits.
        """
        self._check_mode()
        check_combine_dtype(x)
        check_weights(topk_weights, topk_idx)
        num_columns, width = topk_idx.shape[1], x.shape[2]
        sent = x.new_zeros(self.group_size * handle.room * num_columns, width)
        for rows, places in zip(x, handle.places_e, strict=True):
            sent[places] = rows[: len(places)]
        sent = sent.view(self.group_size, -1)
        home = torch.empty_like(sent)
        dist.all_to_all_single(home.view(torch.uint8), sent.view(torch.uint8), group=self.group)
        # Of a selection one rank has sent the row, and the others zeros.
        rows_TKH = home.view(self.group_size, handle.room, num_columns, width).float().sum(dim=0)
        rows_TKH = rows_TKH[: handle.num_tokens]
        weights_TK = topk_weights.where(topk_idx >= 0, 0.0)
        combined = torch.einsum("tkh,tk->th", rows_TKH, weights_TK)
        return combined.to(x.dtype), _event(async_finish), _arrived

    def _check_mode(self) -> None:
        if not self.low_latency_mode:
            raise ValueError("low latency needs a Buffer made with low_latency_mode=True")

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """`part` of every rank, `[R, ...]`."""
        parts = part.new_empty(self.group_size, *part.shape)
        sent = part.contiguous().view(torch.uint8)
        dist.all_gather(list(parts.view(torch.uint8)), sent, group=self.group)
        return parts


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


def _arrived() -> None:
    """The rows are there when the call returns."""
