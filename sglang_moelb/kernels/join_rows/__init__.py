"""What two grouped GEMMs over a rank's experts left, as one: those of the first, then the second's.

Shape letters: e experts of both, a experts of the first, b of the second, M rows that one has room
for, H features.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.join_rows import ref

__all__ = ["join_rows"]


def join_rows(first_aMH: Tensor, second_bMH: Tensor, num_rows_e: Tensor) -> Tensor:
    """Both along their experts, of each expert the rows that it has: room is not copied.

    DeepEP's low-latency combine wants the rows of all local experts in one tensor and reads no
    room; in decode most of it is room.

    Args:
        first_aMH, second_bMH: contiguous, of the same dtype.
        num_rows_e: int32 on the device of the rows, first's experts before second's, at most M.

    Returns:
        `[e, M, H]` in their dtype, not defined in the rows of an expert from its number on. Exact;
        one launch whose size does not depend on values, no host sync, can be captured.

    Raises:
        ValueError: shapes or dtypes that do not belong together.

    Example: first has one expert with the rows 1, 2 of room for 3, second one with the row 5; the
    numbers are 2 and 1: the result is 1, 2, anything and 5, anything, anything.
    """
    if first_aMH.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.join_rows import kernel

        return kernel.join_rows(first_aMH, second_bMH, num_rows_e)
    return ref.join_rows(first_aMH, second_bMH, num_rows_e)
