"""Which experts run at low precision in a layer, from the rows that all ranks counted.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.plan_downgrade import ref

__all__ = ["plan_downgrade"]


def plan_downgrade(
    counts_RW: Tensor,
    *,
    num_experts: int,
    capacity_factor: float,
    vision_share: float,
    form: int,
    low_cost: float = 0.66,
) -> Tensor:
    """Choose the experts to lower: on ranks that are overloaded, and by vision rows.

    Rank r holds the experts r*E/R .. (r+1)*E/R-1; L_r is the rows that all ranks send to them and
    V_r the vision rows among those. The rank is *hot* if L_r > capacity_factor * mean(L), and
    *vision* if V_r / max(L_r, 1) > vision_share; an expert likewise, by its own rows and the mean
    rows of an expert. On a rank that is hot and vision,

    - Form.RANK lowers all experts (ReaLB, arXiv 2604.19503, the scheduling rule);
    - Form.EXPERTS lowers the experts that are hot and vision themselves (ours);
    - Form.FEWEST lowers vision experts, the one with most rows first and of equals the first, while
      the rank's predicted time in rows, high + low_cost * low, is above mean(L) (ours). So these
      are the fewest that bring it to the mean, or all vision experts if they do not.

    On other ranks no form lowers any. Nor is an expert lowered that receives a row of a request
    that refuses lossy levers, and under Form.RANK none of its rank is (ours): a rank computes all
    rows of an expert in one precision. Decode rows are rows like others, as in ReaLB. How many
    tokens a pass must have is asked before. The factors count in millionths; everything is exact
    integers, so that all ranks, host and device decide alike.

    Args:
        counts_RW: int32 rows of `count_experts`, one a rank, with or without histograms. Rows may
            be strided.
        num_experts: E, a multiple of R.
        capacity_factor: C of ReaLB, 0 to 100; 1 there.
        vision_share: M_d of ReaLB, 0 to 1; 0.7 there.
        form: a `Form`.
        low_cost: time of a row at low precision in units of one at high precision, 0 to 1.

    Returns:
        low_E int32, 1 for an expert that runs at low precision. No host sync.

    Raises:
        ValueError: E is no multiple of R, or an option is out of its range.
    """
    if counts_RW.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.plan_downgrade import kernel

        plan = kernel.plan_downgrade
    else:
        plan = ref.plan_downgrade
    return plan(
        counts_RW,
        num_experts=num_experts,
        capacity_factor=capacity_factor,
        vision_share=vision_share,
        form=form,
        low_cost=low_cost,
    )
