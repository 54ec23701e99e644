"""A sum over a run of bytes that tells whether two runs are the same.

Shape letters: B bytes.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.sum_words import ref

__all__ = ["sum_words"]


def sum_words(run_B: Tensor) -> Tensor:
    """The sum of `run_B`'s words of eight bytes, word i times 2i + 1, modulo 2^64.

    A change of one word is always found, since an odd number has an inverse, and words that changed
    places are, but for chance. Ours.

    Args:
        run_B: contiguous uint8 whose length and address are multiples of 8.

    Returns:
        int64 without dimensions, where the run is. Exact; two launches whose sizes depend on B
        alone, no host sync, can be captured.

    Raises:
        ValueError: another dtype or length, or a run that is not contiguous.

    Example: the words 5, 0 and 2 give 5 * 1 + 0 * 3 + 2 * 5 = 15.
    """
    if run_B.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.sum_words import kernel

        return kernel.sum_words(run_B)
    return ref.sum_words(run_B)
