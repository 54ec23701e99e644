"""Weights of the experts in this rank's slots, copied from the ranks that hold them.

Shape letters: P parts of an expert's weights, R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sglang_moelb.kernels.pull_experts import ref

__all__ = ["pull_experts"]


def pull_experts(
    experts_PR: Sequence[Sequence[Tensor]],
    slots_RS: Tensor,
    staged_P: Sequence[Tensor],
    *,
    my_rank: int,
    num_programs: int = 16,
) -> None:
    """Copy the experts that a replica plan puts in this rank's slots, in one launch. Source: ours.

    The plan is read on the device: an empty slot costs nothing and nothing waits for the host. Work
    is dealt chunk by chunk over the slots in use, so that all their sources are read at once. The
    peers take no part; who calls this sees to it that their weights stay as they are and that
    nobody reads the slots meanwhile.

    Args:
        experts_PR: of each part of the weights, at most two (w13 and w2), each rank's own experts,
            contiguous and of one shape and dtype, expert first. On a device: all mapped into this
            process. The same tensors at every call: the addresses of a layer are brought to the
            device once, before any capture.
        slots_RS: int32 logical experts or -1, of `place_replicas`.
        staged_P: of each part the slots of this rank, contiguous, slot first, else shaped like the
            experts. Slots without an expert are left as they are.
        my_rank: whose slots are filled.
        num_programs: programs that copy, each on an SM; fewer leave more to other kernels.

    Raises:
        ValueError: shapes, dtypes or layouts that do not belong together, or an expert whose bytes
            are no multiple of 16.
    """
    pull = ref.pull_experts
    if slots_RS.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.pull_experts import kernel

        pull = kernel.pull_experts
    pull(experts_PR, slots_RS, staged_P, my_rank=my_rank, num_programs=num_programs)
