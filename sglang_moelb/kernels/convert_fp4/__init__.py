"""A layer's expert weights from bfloat16 to FP4, in one launch.

Shape letters: E local experts, N output features, K features, B elements of a block, S scales of a
row (K / B), P bytes of a row (K / 2).
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.block_format import BlockScaled
from sglang_moelb.kernels.convert_fp4 import ref

__all__ = ["convert_fp4"]


def convert_fp4(
    weights: tuple[Tensor, ...],
    wanted_E: Tensor,
    out: tuple[BlockScaled, ...],
    *,
    num_programs: int = 0,
) -> None:
    """Quantise the wanted experts of each tensor into its slot; write nothing of the others.

    The formats are those of `block_format`: MXFP4, MXFP4_CEIL or NVFP4, one for all slots. NVFP4's
    `globals` are read, not computed: weights do not change between passes, so `global_scales` is
    called once at load. One for each expert and tensor: an expert's bytes then do not depend on its
    neighbours, and a replica's equal its original's. Pass equal ones for a GEMM that takes a single
    scale.

    Args:
        weights: one or two contiguous bfloat16 tensors (E, N, K), K a multiple of the block.
        wanted_E: int32, 0 leaves the expert's codes and scales as they are.
        out: slots of the same shapes, `empty_block_scaled`, all in one layout of scales. Padding
            of the scales is not written.
        num_programs: how many programs share the work, to leave multiprocessors to others; 0 takes
            one for each tile.

    Runs in stream order, may be captured, no host sync. Equal, bit by bit, on host and device.

    Raises:
        ValueError: a tensor has no slot of its shape; formats or layouts differ, or are not FP4's.
    """
    ref.check(weights, wanted_E, out)
    if weights[0].is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.convert_fp4 import kernel

        return kernel.convert_fp4(weights, wanted_E, out, num_programs=num_programs)
    return ref.convert_fp4(weights, wanted_E, out, num_programs=num_programs)
