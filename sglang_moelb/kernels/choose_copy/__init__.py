"""Logical to physical ids where experts have lasting copies: taken in turn, or by shares.

Shape letters: T tokens, K top-k, E logical experts, C most copies of an expert, B bounds between
the shares of its copies.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.choose_copy import ref

__all__ = ["choose_copy"]


def choose_copy(
    ids_TK: Tensor, copies_EC: Tensor, num_copies_E: Tensor, bounds_EB: Tensor, *, shift: int
) -> Tensor:
    """Send each row to a copy of its expert, by turns or by the copies' shares.

    Where an expert's first bound is 0, by turns: token t to copy (t + shift) mod its copies. Else
    token t has the position (t + shift) * STEP mod UNITS, and goes to the first copy whose bound is
    above it, or to the last copy: so copy c gets bounds[c] - bounds[c - 1] of any UNITS tokens that
    follow one another, and of shorter runs nearly its share.

    So neighbouring tokens, which in an image often choose the same experts, go to different copies.
    Which copy a row gets depends on its place and on nothing that other tokens do, so ranks need no
    exchange. Source: ours; R&Q (arXiv 2602.19938) splits evenly and leaves open how.

    Args:
        ids_TK: int64 or int32 logical ids; entries outside 0..E-1 become -1. May be strided.
        copies_EC: int32 physical ids of each expert's copies, the first `num_copies_E` of a row.
        num_copies_E: int32, at least 1.
        bounds_EB: int32, where the shares of all copies but the last end, in 1/UNITS, ascending, 1
            to UNITS - 1, and UNITS behind them; a row of 0 splits evenly, by turns.
        shift: where this rank begins; another one on each rank, so that their first tokens differ.

    Returns:
        physical ids, like ids_TK, contiguous. One launch, no sync, can be captured; exact, equal on
        host and device.

    Raises:
        ValueError: shapes that do not belong together, or a negative shift.

    Example: expert 0 has the copies 0 and 5, expert 1 the copy 1; ids [[0, 1], [1, 0], [0, -1]]
    with shift 0 become [[0, 1], [1, 5], [0, -1]] by
    turns. With bounds [[16], [0]] copy 0 has a quarter of expert 0's rows: the tokens have the
    positions 0, 39 and 14, and the ids become [[0, 1], [1, 5], [0, -1]] too.
    """
    if ids_TK.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.choose_copy import kernel

        return kernel.choose_copy(ids_TK, copies_EC, num_copies_E, bounds_EB, shift=shift)
    return ref.choose_copy(ids_TK, copies_EC, num_copies_E, bounds_EB, shift=shift)
