"""All weights of a layer's experts from bf16 to fp8, for those experts that a plan wants.

Shape letters: E local experts of this rank, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sglang_moelb.kernels.convert_fp8 import ref

__all__ = ["convert_fp8"]


def convert_fp8(
    weights: Sequence[Tensor],
    out: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    wanted_E: Tensor,
    num_programs: int | None = None,
) -> None:
    """Write the wanted experts of every weight in float8 e4m3 with a scale a block of 128x128.

    Format, and what becomes of NaN and Inf: `sglang_moelb.kernels.fp8`; finite blocks equal
    DeepGEMM's `per_block_cast_to_fp8` without ue8m0, bit for bit. Blocks at the edge of an N or K
    that 128 does not divide are as if filled up with zeros. An expert that is not wanted is neither
    read nor written.

    Args:
        weights: one or more bfloat16 [E, N, K], such as w13 and w2 of a layer; contiguous.
        out: float8_e4m3fn, of the same shapes; contiguous.
        scales: float32 [E, ceil(N / 128), ceil(K / 128)]; contiguous.
        wanted_E: int32, 0 leaves the expert's part of `out` and `scales` as it is.
        num_programs: blocks of the one launch, each of which takes its share of the work in turn,
            so at most as many SMs are busy; None for as many as the device runs at once.

    Runs on the device of its tensors, in one launch, reading `wanted_E` there: no host sync, and
    it can be captured. Exact; equal on host and device, but for the sign of NaN.

    Raises:
        ValueError: the shapes, dtypes or strides are not as above.
    """
    if wanted_E.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.convert_fp8 import kernel

        kernel.convert_fp8(weights, out, scales, wanted_E=wanted_E, num_programs=num_programs)
        return
    ref.convert_fp8(weights, out, scales, wanted_E=wanted_E, num_programs=num_programs)
