"""Where each group's rows are cut so that it keeps at most its capacity.

Shape letters: R ranks whose rows count, W row width, G groups (E experts or the devices).
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.plan_cuts import ref

__all__ = ["plan_cuts"]


def plan_cuts(
    rows_RW: Tensor, capacity_G: Tensor, *, my_rank: int, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Find each group's cut bin, and this rank's quota of the amounts in it. Source: ours.

    Group g holds the experts g*E/G .. (g+1)*E/G-1. room = max(0, capacity - protected amounts). A
    group whose cuttable amounts fit in its room is not cut: bin -1, quota 0. Else bins are taken
    from the largest key down; the cut bin is the first with which the sum exceeds the room. Bins
    above it are kept whole, bins below it are dropped whole, and what is left, m, is dealt to the
    ranks by the amounts they have in it: with prefix sums c_r and total n, quota_r =
    m*c_r//n - m*c_{r-1}//n. These sum to m and never exceed what the rank has.

    Every rank plans from the same rows, so no rank has to be told. With the scope of the source
    alone, pass the own row (R = 1) and my_rank 0.

    Args:
        rows_RW: int32 rows of `count_experts` made with a key_rule. Rows may be strided.
        capacity_G: int64 in units of amounts; 0 drops all that is not protected.
        my_rank: index of the row whose quota is wanted.
        num_experts: E, a multiple of G.

    Returns:
        cut_bin_G int32 and cut_quota_G int32. Exact integers, equal on host and device; no sync.

    Raises:
        ValueError: E is no multiple of G, my_rank is not below R, or rows have no histogram.
    """
    if rows_RW.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.plan_cuts import kernel

        return kernel.plan_cuts(rows_RW, capacity_G, my_rank=my_rank, num_experts=num_experts)
    return ref.plan_cuts(rows_RW, capacity_G, my_rank=my_rank, num_experts=num_experts)
