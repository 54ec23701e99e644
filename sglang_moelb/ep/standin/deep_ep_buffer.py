"""The intranode normal mode of DeepEP's `Buffer`, in plain torch over `torch.distributed`.

The arguments, the results and the refusals are those of `deep_ep` 2.1, so that SGLang's
`DeepEPDispatcher` runs unchanged. What the real one gives up at run time by a device assertion is
a `ValueError` here; what the stand-in lacks (several nodes, cached handles, CUDA graphs) is refused
by name. Runs on the host, with any backend that has `all_to_all_single`; low latency is
`deep_ep_low_latency`'s.

Shapes: T tokens of this rank, K top-k columns, R ranks, E experts, N rows received, H hidden size.
Source of the semantics: DeepEP's documentation of `Buffer`, checked against the real one by
`tests/gpu/check_standin.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sglang_moelb.ep.standin.deep_ep_checks import (
    SUPPORTED_NUM_RANKS,
    check_combine_dtype,
    check_events,
    check_layout,
    check_rows,
    check_topk_idx,
    check_weights,
    refuse,
    topk_idx_t,
)
from sglang_moelb.ep.standin.deep_ep_types import (
    Config,
    DispatchHandle,
    EventHandle,
    EventOverlap,
)

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Buffer:
    """Expert-parallel dispatch and combine between the ranks of `group` (host, any backend).

    Every rank of the group must make every `dispatch` and `combine` call, ranks without tokens
    too: both are collective.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool | None = None,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object = None,
    ) -> None:
        refuse("num_rdma_bytes", num_rdma_bytes, "the stand-in knows one node only")
        refuse("enable_shrink", enable_shrink, "leave it out")
        refuse("comm", comm, "pass a torch.distributed group")
        if group.size() not in SUPPORTED_NUM_RANKS:
            raise ValueError(
                f"{group.size()} EP ranks: DeepEP's intranode mode has {SUPPORTED_NUM_RANKS}"
            )
        self.group = group
        self.group_size = group.size()
        self.rank = group.rank()
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = 0
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy

    def destroy(self) -> None:
        """Release the buffer: nothing is held here."""
        if not self.explicitly_destroy:
            raise ValueError("destroy() needs a Buffer made with explicitly_destroy=True")

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the default number of SMs of the kernels: an even number, without effect here."""
        Config(num_sms=new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event at this point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The recommended configuration for `num_ranks` ranks; ValueError beyond one node."""
        if num_ranks not in SUPPORTED_NUM_RANKS:
            raise ValueError(f"num_ranks={num_ranks}: one of {SUPPORTED_NUM_RANKS}")
        return Config(num_sms=Buffer.num_sms)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """What this rank will send where.

        Args:
            topk_idx: int64 [T, K] contiguous, expert of each selection, -1 for none.
            num_experts: E, a multiple of R; expert e lives on rank `e // (E // R)`.

        Returns:
            int32 [R] tokens per rank, each counted once; None (no RDMA); int32 [E] selections per
            expert; bool [T, R] whether a token goes to a rank; the event.
        """
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        check_topk_idx(topk_idx, num_experts, self.group_size)
        selected = topk_idx >= 0
        num_local = num_experts // self.group_size
        per_expert = torch.bincount(topk_idx[selected], minlength=num_experts).to(torch.int32)
        # Column R collects the -1 entries and is cut off.
        rank_TK = torch.where(selected, topk_idx // num_local, self.group_size)
        in_rank = torch.zeros(topk_idx.shape[0], self.group_size + 1, dtype=torch.bool)
        in_rank.scatter_(1, rank_TK, True)
        in_rank = in_rank[:, : self.group_size].contiguous()
        per_rank = in_rank.sum(dim=0, dtype=torch.int32)
        return per_rank, None, per_expert, in_rank, _event(async_finish)

    def dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, torch.Tensor, torch.Tensor, list[int], DispatchHandle, EventOverlap]:
        """Send each token once to every rank that holds one of its experts. Collective.

        Args:
            x: [T, H] contiguous, or the tuple (values [T, H], scales [T, S]).
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of `get_dispatch_layout`.
            topk_idx: int64 [T, K]; topk_weights: float32 [T, K]; both contiguous, K <= 32.
            expert_alignment: the returned counts are rounded up to a multiple of it.

        Returns:
            rows [N, H] (or the tuple) ordered by source rank, then source token; local expert ids
            int64 [N, K], -1 where the expert is not on this rank; weights float32 [N, K], 0 there;
            rows per local expert, rounded up; the handle for `combine`; the event.
        """
        refuse("handle", handle, "a cached layout is not kept, pass the layout tensors")
        refuse("num_worst_tokens", num_worst_tokens, "the stand-in runs in no CUDA graph")
        refuse("num_tokens_per_rdma_rank", num_tokens_per_rdma_rank, "one node only")
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        parts = list(x) if isinstance(x, tuple) else [x]
        check_layout(num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        if topk_idx is None or topk_weights is None:
            raise ValueError("stand-in: dispatch needs topk_idx and topk_weights")
        check_topk_idx(topk_idx, num_tokens_per_expert.numel(), self.group_size)
        check_weights(topk_weights, topk_idx)
        check_rows(parts, topk_idx.shape[0])

        num_received, counts = self._exchange_counts(num_tokens_per_rank, num_tokens_per_expert)
        rank_of_row, tokens = is_token_in_rank.t().nonzero(as_tuple=True)
        num_local = len(counts)
        ids, weights = _localise(topk_idx[tokens], topk_weights[tokens], rank_of_row, num_local)
        handle = DispatchHandle(
            tokens, num_tokens_per_rank.tolist(), num_received, topk_idx.shape[0]
        )
        sent = [*(part[tokens] for part in parts), ids, weights]
        *rows, ids, weights = self._exchange_rows(sent, handle.num_sent, num_received)
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        received: Rows = (rows[0], rows[1]) if isinstance(x, tuple) else rows[0]
        return received, ids, weights, counts, handle, _event(async_finish)

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, EventOverlap]:
        """Bring rows home and add them up per token, without weights. Collective.

        Args:
            x: bfloat16 or float32 [N, H], one row for each received row, in the same order.
            handle: from the `dispatch` that received them.

        Returns:
            [T, H] in the dtype of x, summed in float32 in the order of the ranks; zero for a token
            that went nowhere; None (no weights); the event.
        """
        refuse("topk_weights", topk_weights, "SGLang combines without them")
        refuse("bias", bias, "SGLang combines without it")
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        check_rows([x], sum(handle.num_received))
        check_combine_dtype(x)
        (home,) = self._exchange_rows([x], handle.num_received, handle.num_sent)
        combined = torch.zeros(handle.num_tokens, x.shape[1], dtype=torch.float32)
        by_rank = zip(
            home.split(handle.num_sent), handle.sent_tokens.split(handle.num_sent), strict=True
        )
        for rows, tokens in by_rank:  # a token occurs at most once per rank
            combined[tokens] += rows.float()
        return combined.to(x.dtype), None, _event(async_finish)

    def _exchange_counts(
        self, num_tokens_per_rank: torch.Tensor, num_tokens_per_expert: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """Rows from each rank, and selections of each local expert over all ranks."""
        per_expert = num_tokens_per_expert.view(self.group_size, -1)
        sent = torch.cat([num_tokens_per_rank.unsqueeze(1), per_expert], dim=1)
        sent = sent.to(torch.int32).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received[:, 0].tolist(), received[:, 1:].sum(dim=0).tolist()

    def _exchange_rows(
        self, parts: Sequence[torch.Tensor], num_sent: list[int], num_received: list[int]
    ) -> list[torch.Tensor]:
        """All-to-all of 2-D tensors with as many rows each, as bytes in one message."""
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        received = packed.new_empty(sum(num_received), packed.shape[1])
        dist.all_to_all_single(received, packed, num_received, num_sent, group=self.group)
        widths = [part.shape[1] * part.element_size() for part in parts]
        columns = received.split(widths, dim=1)
        # A clone, since a column of a single row counts as contiguous but may be misaligned.
        return [
            column.clone(memory_format=torch.contiguous_format).view(part.dtype)
            for column, part in zip(columns, parts, strict=True)
        ]


def _localise(
    ids_NK: torch.Tensor, weights_NK: torch.Tensor, rank_of_row: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as their destination numbers its experts, -1 and weight 0 for other ranks' experts."""
    local = ids_NK - (rank_of_row * num_local).unsqueeze(1)
    here = (local >= 0) & (local < num_local)
    return torch.where(here, local, -1), torch.where(here, weights_NK, 0.0)


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)
