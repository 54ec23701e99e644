"""Candidates of an expansion: each token's best experts of its own rank beside its top-k.

Shape letters: T tokens of this rank (may be 0), K top-k, E logical experts, C = K + num_extra.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.widen_candidates import ref

__all__ = ["widen_candidates"]


def widen_candidates(
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    flags_T: Tensor,
    *,
    first_local: int,
    num_local: int,
    num_extra: int,
) -> tuple[Tensor, Tensor]:
    """Append local candidates. Source: Capacity-Aware Inference, Algorithm 2 (Expanded Drop); the
    limit on their number and the scale of their weights are ours.

    A token's candidates are the experts first_local .. first_local+num_local-1 that are not in its
    top-k and have a score above 0, best first, ties by lower id, at most num_extra. Their weight
    is scores[e] * s with s = weights[t, 0] / scores[t, ids[t, 0]], rounded once after each of the
    two operations, so that routers that renormalise or scale stay on one scale. No candidates:
    protected tokens, padding (ids[t, 0] is no expert), and s not above 0 or not finite.

    Args:
        ids_TK: int32 or int64 logical experts, -1 none. Rows may be strided.
        weights_TK: float32 gate weights. Rows may be strided.
        scores_TE: float32 probabilities of the router. Rows may be strided.
        flags_T: uint8, FLAG_PROTECTED.
        first_local, num_local: the experts of this rank.
        num_extra: number of columns to add, 0 or more.

    Returns:
        New ids_TC (dtype of ids_TK) and weights_TC float32; -1 and 0 where a candidate is missing.
        Equal, bit by bit, on every run and on host and device; no host sync.

    Raises:
        ValueError: the local experts do not lie within 0..E-1.
    """
    args = (ids_TK, weights_TK, scores_TE, flags_T)
    if ids_TK.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.widen_candidates import kernel

        return kernel.widen_candidates(
            *args, first_local=first_local, num_local=num_local, num_extra=num_extra
        )
    return ref.widen_candidates(
        *args, first_local=first_local, num_local=num_local, num_extra=num_extra
    )
