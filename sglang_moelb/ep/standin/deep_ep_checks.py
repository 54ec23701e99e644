"""What DeepEP and the stand-in refuse: every check raises and names the argument and the fix.

DeepEP gives most of these up at run time, some as a device assertion; on the host they are errors.
Shapes: T tokens of this rank, K top-k columns, R ranks, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_moelb.ep.expert_rows import MAX_LOCAL_EXPERTS
from sglang_moelb.ep.standin.deep_ep_types import EventOverlap

topk_idx_t = torch.int64
MAX_NUM_TOPK = 32  # a device assertion of DeepEP's intranode kernels: one lane of a warp a column
SUPPORTED_NUM_RANKS = (2, 4, 8)
COMBINE_DTYPES = (torch.bfloat16, torch.float32)


def refuse(name: str, value: object, fix: str) -> None:
    """Raise where an argument asks for what the stand-in lacks."""
    if value is not None and value is not False and not (isinstance(value, int) and value == 0):
        raise NotImplementedError(f"stand-in for deep_ep: {name}={value!r} is not supported: {fix}")


def check_events(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    """Memory owned by the communication stream needs an event on both sides."""
    if allocate_on_comm_stream and not (previous_event is not None and async_finish):
        raise ValueError("allocate_on_comm_stream needs previous_event and async_finish")


def check_topk_idx(topk_idx: torch.Tensor | None, num_experts: int, num_ranks: int) -> None:
    """Contiguous int64 [T, K], K <= 32, values -1 or a logical expert below `num_experts`."""
    if topk_idx is None:
        raise ValueError("topk_idx is missing: pass int64 [T, K]")
    if topk_idx.dtype != topk_idx_t or topk_idx.dim() != 2 or not topk_idx.is_contiguous():
        raise ValueError(
            f"topk_idx is {topk_idx.dtype} {tuple(topk_idx.shape)}: contiguous int64 [T, K] needed"
        )
    if topk_idx.shape[1] > MAX_NUM_TOPK:
        raise ValueError(f"topk_idx has {topk_idx.shape[1]} columns: at most {MAX_NUM_TOPK}")
    if num_experts <= 0 or num_experts % num_ranks:
        raise ValueError(f"num_experts={num_experts}: must be a multiple of {num_ranks} ranks")
    if num_experts // num_ranks > MAX_LOCAL_EXPERTS:
        raise ValueError(
            f"num_experts={num_experts}: at most {MAX_LOCAL_EXPERTS} on each of {num_ranks} ranks"
        )
    if topk_idx.numel() and not -1 <= int(topk_idx.min()) <= int(topk_idx.max()) < num_experts:
        raise ValueError(
            f"topk_idx holds {int(topk_idx.min())}..{int(topk_idx.max())}: expected -1 (none) or "
            f"0..{num_experts - 1}"
        )


def check_weights(topk_weights: torch.Tensor | None, topk_idx: torch.Tensor) -> None:
    """Contiguous float32 of the shape of `topk_idx`."""
    if topk_weights is None:
        raise ValueError("topk_weights is missing: pass float32 [T, K]")
    if (
        topk_weights.dtype != torch.float32
        or topk_weights.shape != topk_idx.shape
        or not topk_weights.is_contiguous()
    ):
        raise ValueError(
            f"topk_weights is {topk_weights.dtype} {tuple(topk_weights.shape)}: contiguous float32 "
            f"{tuple(topk_idx.shape)} needed"
        )


def check_rows(parts: Sequence[torch.Tensor], num_rows: int) -> None:
    """Contiguous 2-D tensors of `num_rows` rows, a row of the first a multiple of 16 bytes."""
    for part in parts:
        if part.dim() != 2 or part.shape[0] != num_rows or not part.is_contiguous():
            raise ValueError(f"x is {tuple(part.shape)}: contiguous [{num_rows}, H] needed")
    if parts[0].shape[1] * parts[0].element_size() % 16:
        raise ValueError(f"a row of x has {parts[0].shape[1]} elements: not a multiple of 16 bytes")


def check_combine_dtype(x: torch.Tensor) -> None:
    """bfloat16 as on a GPU, or float32, in which exactness is checked."""
    if x.dtype not in COMBINE_DTYPES:
        raise ValueError(f"x is {x.dtype}: combine adds up {COMBINE_DTYPES}")


def check_layout(
    num_tokens_per_rank: torch.Tensor | None,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_expert: torch.Tensor | None,
) -> None:
    """The three tensors of `get_dispatch_layout`, and the first two agree with each other."""
    if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
        raise ValueError("dispatch needs the three tensors of get_dispatch_layout")
    if not torch.equal(is_token_in_rank.sum(dim=0, dtype=torch.int32), num_tokens_per_rank):
        raise ValueError("num_tokens_per_rank does not agree with is_token_in_rank")
