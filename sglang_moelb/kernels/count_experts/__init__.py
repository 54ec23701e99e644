"""Counts of one rank's rows per expert and modality, with histograms of what a cut may drop.

Shape letters: T tokens of this rank (may be 0), K top-k, C columns: the first `topk` are routed,
the rest are candidates of an expansion; L layers, W row width.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.count_experts import ref
from sglang_moelb.kernels.keys import KeyRule

__all__ = ["KeyRule", "count_experts", "count_layers"]


def count_experts(
    ids_TC: Tensor,
    weights_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    *,
    num_experts: int,
    topk: int,
    key_rule: KeyRule | None,
) -> tuple[Tensor, Tensor | None]:
    """Count what this rank routes, in one pass over the data. Source of the algorithm: ours.

    A token counts when one of its routed ids is not -1 (padding has none). Text, vision and
    refused rows and protected amounts are of routed rows; the amounts that may be cut are of all
    rows of tokens that are not protected. Ids outside 0..E-1 are no rows.

    Args:
        ids_TC: int32 or int64 logical experts, -1 none. Rows may be strided.
        weights_TC: float32 gate weights. Rows may be strided.
        flags_T: uint8, FLAG_VISION, FLAG_PROTECTED and FLAG_REFUSED.
        amounts_T: int32 in 1..AMOUNT_ONE, or None: every row weighs 1.
        num_experts: E.
        topk: number of routed columns, at most C.
        key_rule: how rows are ranked, or None: no histogram and no keys.

    Returns:
        row_W int32 as in `row_layout`, and keys_TC int32 (0 where there is no row) or None.
        Equal, bit by bit, on every run and on host and device; no host sync.

    Raises:
        ValueError: a key_rule with an unknown metric.
    """
    args = (ids_TC, weights_TC, flags_T, amounts_T)
    if ids_TC.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.count_experts import kernel

        return kernel.count_experts(*args, num_experts=num_experts, topk=topk, key_rule=key_rule)
    return ref.count_experts(*args, num_experts=num_experts, topk=topk, key_rule=key_rule)


def count_layers(
    ids_LTK: Tensor, flags_T: Tensor, *, num_experts: int, out_LW: Tensor | None = None
) -> Tensor:
    """The rows that `count_experts` gives without amounts and key rule, of many layers at once.

    Source: ours. For passes in which nothing is cut: one launch for all layers.

    Args:
        ids_LTK: int32 or int64 logical experts, -1 none; contiguous.
        flags_T: uint8, as in `count_experts`; the same tokens in all layers.
        num_experts: E.
        out_LW: int32 and contiguous, written and returned; or None for a new tensor.

    Returns:
        rows_LW int32, rows as in `row_layout` without histogram. Equal, bit by bit, on every run
        and on host and device; no host sync.
    """
    if ids_LTK.is_cuda:
        from sglang_moelb.kernels.count_experts import kernel

        return kernel.count_layers(ids_LTK, flags_T, num_experts=num_experts, out_LW=out_LW)
    return ref.count_layers(ids_LTK, flags_T, num_experts=num_experts, out_LW=out_LW)
