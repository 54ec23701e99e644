"""Which experts are copied to which ranks, and who computes which rows, planned on the device.

Shape letters: R ranks, W row width, E logical experts, S slots of a rank, C limits tried,
e experts of a rank.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.place_replicas import ref

__all__ = ["place_replicas"]


def place_replicas(
    rows_RW: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    send_rows: int = 0,
    receive_rows: int = 0,
    min_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan the copies of one layer. Source: `controller.place_replicas`, whose plan it equals.

    32 limits of a rank's time are tried side by side, from the mean rows to those of the busiest
    rank. Under each, ranks above it export, the busiest first: the expert with most rows left, to
    the rank with most room. The limit whose slowest rank ends earliest wins.

    Every rank plans from the same rows, so no rank has to be told.

    Args:
        rows_RW: int32 rows of `count_experts`, text and vision rows of every expert. May be
            strided. The rows of all experts together stay below 2**31.
        num_experts: E, a multiple of R; experts lie on their home ranks in equal blocks.
        num_slots: S, copies that a rank can hold beside its own experts, at most 255.
        send_rows, receive_rows: the rows that a rank computes in the time by which a copy delays
            its sender and its receiver.
        min_rows: fewest rows worth a copy.

    Returns:
        slots_RS int32, the logical expert in each slot or -1; quota_ER int32, the rows of each
        expert that each rank computes; times_2 int64, the time of the slowest rank without and
        with the plan, in rows. Exact integers, equal on host and device; no sync, one launch.

    Raises:
        ValueError: E is no multiple of R, sizes are out of range, or costs are negative.
    """
    costs = {"send_rows": send_rows, "receive_rows": receive_rows, "min_rows": min_rows}
    if rows_RW.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.place_replicas import kernel

        return kernel.place_replicas(rows_RW, num_experts=num_experts, num_slots=num_slots, **costs)
    return ref.place_replicas(rows_RW, num_experts=num_experts, num_slots=num_slots, **costs)
