"""Rows that a cut drops get id -1 and weight 0.

Shape letters: T tokens of this rank (may be 0), C columns: the first `topk` are routed, the rest
are candidates of an expansion; G groups.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.cut_tokens import ref

__all__ = ["cut_tokens"]


def cut_tokens(
    ids_TC: Tensor,
    weights_TC: Tensor,
    keys_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    cut_bin_G: Tensor,
    cut_quota_G: Tensor,
    *,
    num_experts: int,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the cuts of `plan_cuts` to this rank's rows. Source: ours, after Capacity-Aware
    Inference, Algorithms 1 and 2.

    Kept: rows of protected tokens and of groups that are not cut (bin -1); rows with a bin above
    the cut bin; and in the cut bin, by key descending, then by t*C+c ascending, as long as their
    amounts sum to at most the quota: the first that does not fit ends it. All other rows are
    dropped. Ids outside 0..E-1 are no rows and pass unchanged.

    Args:
        ids_TC: int32 or int64 logical experts, -1 none. Rows may be strided.
        weights_TC: float32 gate weights, below 2**15. Rows may be strided.
        keys_TC: int32 keys of `count_experts`, of the same rows.
        flags_T: uint8, FLAG_VISION and FLAG_PROTECTED.
        amounts_T: int32 in 1..AMOUNT_ONE, or None: every row weighs 1.
        cut_bin_G, cut_quota_G: int32, from `plan_cuts`.
        num_experts: E, a multiple of G.
        topk: number of routed columns, at most C.

    Returns:
        New ids_TC and weights_TC, and stats_8 int64: mass of routed rows, of routed rows dropped,
        and of candidates kept, as sums of round-half-even(weight * MASS_ONE) (NaN counts 0, weights
        are clamped to 2**15); then how many routed rows were dropped, candidates kept, and routed
        rows of vision tokens dropped; 0; 0. Equal, bit by bit, on every run and on host and device;
        no host sync.

    Raises:
        ValueError: E is no multiple of G.
    """
    args = (ids_TC, weights_TC, keys_TC, flags_T, amounts_T, cut_bin_G, cut_quota_G)
    if ids_TC.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.cut_tokens import kernel

        return kernel.cut_tokens(*args, num_experts=num_experts, topk=topk)
    return ref.cut_tokens(*args, num_experts=num_experts, topk=topk)
