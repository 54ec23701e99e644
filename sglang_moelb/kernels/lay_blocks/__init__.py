"""Which rows each block of a grouped GEMM multiplies, and of which expert: the tables of Marlin's.

Shape letters: e experts, S rows.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.lay_blocks import ref
from sglang_moelb.kernels.lay_blocks.ref import Blocks

__all__ = ["Blocks", "lay_blocks"]


def lay_blocks(num_rows_e: Tensor, *, num_rows: int, room: int, block: int) -> Blocks:
    """The blocks of `num_rows` rows that lie expert by expert, a block's rows of one expert.

    SGLang's own draws a row's place by atomics; this is equal in every call, and so is the order
    of a GEMM's sums, which depends on the place of a block.

    Args:
        num_rows_e: int32 on the device of the rows; their sum is at most `num_rows`.
        num_rows: rows that there is memory for, S.
        room: rows that each expert has room for, where its rows begin at a multiple of it, as
            DeepEP's low-latency dispatch lays them; 0 where they follow the last expert's.
        block: rows of a block, one of `ref.BLOCKS`.

    Returns:
        Tables for as many blocks as there can be. One launch whose size does not depend on values,
        no host sync, can be captured. Exact.

    Raises:
        ValueError: another block, a room that does not fit, or numbers that are not int32.

    Example: two experts of 9 and 1 rows with room for 16 each, in blocks of 8:

        rows 0 to 7; 8 and 7 of none; 16 and 7 of none; 8 of none, which are 32
        experts 0, 0, 1, 1; used 24, 0: the first three blocks
    """
    if num_rows_e.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.lay_blocks import kernel

        return kernel.lay_blocks(num_rows_e, num_rows=num_rows, room=room, block=block)
    return ref.lay_blocks(num_rows_e, num_rows=num_rows, room=room, block=block)
