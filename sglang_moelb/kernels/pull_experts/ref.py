"""Reference of `pull_experts` in plain torch. Shape letters as in the package."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ALIGN_BYTES = 16
MAX_PARTS = 2


def pull_experts(
    experts_PR: Sequence[Sequence[Tensor]],
    slots_RS: Tensor,
    staged_P: Sequence[Tensor],
    *,
    my_rank: int,
    num_programs: int = 16,
) -> None:
    """See `sglang_moelb.kernels.pull_experts`. Runs wherever its tensors are, with a sync."""
    check_pull(experts_PR, slots_RS, staged_P, my_rank, num_programs)
    for slot, expert in enumerate(slots_RS[my_rank].tolist()):
        if expert < 0:
            continue
        for experts_R, staged in zip(experts_PR, staged_P, strict=True):
            rank, place = divmod(expert, len(experts_R[0]))
            staged[slot].copy_(experts_R[rank][place])


def check_pull(
    experts_PR: Sequence[Sequence[Tensor]],
    slots_RS: Tensor,
    staged_P: Sequence[Tensor],
    my_rank: int,
    num_programs: int,
) -> None:
    """Raise ValueError for what does not belong together. Host only, no sync."""
    if not 1 <= len(experts_PR) <= MAX_PARTS or len(staged_P) != len(experts_PR):
        raise ValueError(f"experts of {len(experts_PR)} parts, slots of {len(staged_P)}; 1 or 2")
    if len({len(experts_R[0]) for experts_R in experts_PR}) != 1:
        raise ValueError("the parts are of different numbers of experts")
    if not 0 <= my_rank < len(slots_RS):
        raise ValueError(f"my_rank {my_rank} is not one of {len(slots_RS)} ranks")
    if num_programs < 1:
        raise ValueError(f"num_programs {num_programs}: at least 1 must copy")
    for experts_R, staged in zip(experts_PR, staged_P, strict=True):
        _check_part(experts_R, slots_RS, staged)


def _check_part(experts_R: Sequence[Tensor], slots_RS: Tensor, staged: Tensor) -> None:
    if len(slots_RS) != len(experts_R):
        raise ValueError(f"slots of {len(slots_RS)} ranks, experts of {len(experts_R)}")
    first = experts_R[0]
    for rank, experts in enumerate(experts_R):
        if experts.shape != first.shape or experts.dtype != staged.dtype:
            raise ValueError(
                f"experts of rank {rank} are {experts.dtype} {tuple(experts.shape)}, those of "
                f"rank 0 {first.dtype} {tuple(first.shape)}, slots {staged.dtype}"
            )
        if not experts.is_contiguous() or not staged.is_contiguous():
            raise ValueError(f"experts of rank {rank} and slots must be contiguous")
    if staged.shape != (slots_RS.shape[1], *first.shape[1:]):
        raise ValueError(
            f"slots of shape {tuple(staged.shape)} do not hold {slots_RS.shape[1]} experts of "
            f"shape {tuple(first.shape[1:])}"
        )
    expert_bytes = first.stride(0) * first.element_size()
    if expert_bytes == 0 or expert_bytes % ALIGN_BYTES:
        raise ValueError(f"an expert of {expert_bytes} bytes is no multiple of {ALIGN_BYTES}")
