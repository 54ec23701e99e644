"""Activations from bf16 to fp8 for DeepGEMM's grouped GEMMs, alone or with SiLU-and-multiply.

Shape letters: T rows, H features, N gate and up features (N = 2 * I), I features between the two
GEMMs, G groups of 128 features, W words of four groups, e local experts, M rows that one has room
for.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.quantise_rows import ref

__all__ = ["quantise_masked_rows", "quantise_rows", "quantise_rows_ue8m0", "silu_mul_quantise"]


def quantise_rows(
    x_TH: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows in float8 e4m3 with a scale for every 128 columns.

    Format, and what becomes of NaN and Inf: `sglang_moelb.kernels.fp8`; finite groups equal
    DeepGEMM's `per_token_cast_to_fp8` without ue8m0, bit for bit.

    Args:
        x_TH: bfloat16, H a multiple of 128; T may be 0. Rows may be strided.
        num_rows_valid: int32 with one element, on the device of x: rows from it on are padding, and
            their results are not defined. None: all rows count.
        column_major: the scales' memory runs along the rows, each group's column starting at a
            multiple of 16 bytes, as TMA wants it: DeepGEMM on Hopper takes such scales as they
            are, and transposes others in a launch of its own. Else it runs along the groups, as
            SGLang's scatter into the experts' order wants it.

    Returns:
        q_TH float8_e4m3fn, contiguous, and scale_TG float32. Exact; equal on host and device but
        for the sign of NaN; no host sync.

    Raises:
        ValueError: x is not bfloat16, or H is no multiple of 128.
    """
    if x_TH.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.quantise_rows import kernel

        return kernel.quantise_rows(x_TH, num_rows_valid=num_rows_valid, column_major=column_major)
    return ref.quantise_rows(x_TH, num_rows_valid=num_rows_valid, column_major=column_major)


def silu_mul_quantise(
    gate_up_TN: Tensor, *, num_rows_valid: Tensor | None = None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """What stands between the two GEMMs of an expert: quantise_rows of silu(gate) * up.

    gate is the left half of the columns, up the right one. silu(gate) * up is computed in float32
    and rounded to bfloat16 before it is quantised, as SGLang's runner does in two launches. Host
    and device round exp differently, so that one may be the next bfloat16 to the other's.

    Args:
        gate_up_TN: bfloat16, N a multiple of 256; otherwise as in `quantise_rows`.
        num_rows_valid, column_major: as in `quantise_rows`.

    Returns:
        q_TI float8_e4m3fn and scale_TG float32, as in `quantise_rows`. No host sync.

    Raises:
        ValueError: gate_up is not bfloat16, or N is no multiple of 256.
    """
    if gate_up_TN.is_cuda:
        from sglang_moelb.kernels.quantise_rows import kernel

        return kernel.silu_mul_quantise(
            gate_up_TN, num_rows_valid=num_rows_valid, column_major=column_major
        )
    return ref.silu_mul_quantise(
        gate_up_TN, num_rows_valid=num_rows_valid, column_major=column_major
    )


def quantise_masked_rows(x_eMH: Tensor, num_rows_e: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of the first rows of each expert, as DeepEP's low-latency dispatch lays them.

    Args:
        x_eMH: bfloat16, H a multiple of 128, M one of 4, as every number of ranks times tokens that
            DeepEP has room for is.
        num_rows_e: int32 on the device of x, at most M: rows of an expert from it on are room,
            their results are not defined.

    Returns:
        q_eMH float8_e4m3fn, contiguous, and scale_eMG float32 with memory along an expert's rows:
        DeepGEMM's masked grouped GEMM on Hopper takes it as it is. Exact as `quantise_rows`; one
        launch whose size does not depend on values, no host sync, can be captured.

    Raises:
        ValueError: as `quantise_rows`, or shapes that do not belong together.

    Example: one expert with room for 4 rows and one there, of 4.48: q is 448 in that row, its scale
    0.01; the other three rows are not read.
    """
    if x_eMH.is_cuda:
        from sglang_moelb.kernels.quantise_rows import kernel

        return kernel.quantise_masked_rows(x_eMH, num_rows_e)
    return ref.quantise_masked_rows(x_eMH, num_rows_e)


def quantise_rows_ue8m0(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 e4m3 with a power of two for every 128 columns: DeepGEMM's on SM100.

    The scale of a group is the least power of two that keeps its largest value within 448; finite
    groups equal DeepGEMM's `per_token_cast_to_fp8` with ue8m0, bit for bit. A group that holds NaN
    or Inf becomes NaN, as e8m0 has no infinity: its values and its scale byte, 255.

    Args:
        x_TH: bfloat16, H a multiple of 128; T may be 0. Rows may be strided.

    Returns:
        q_TH float8_e4m3fn, contiguous, and scale_TW int32, contiguous: byte g % 4 of word g // 4
        (little-endian) is the exponent of group g plus 127; bytes of no group are 0. That is what
        SGLang's scatter into the experts' order takes on Blackwell. Exact; equal on host and device
        but for the sign of NaN; no host sync.

    Raises:
        ValueError: x is not bfloat16, or H is no multiple of 128.

    Example: a group whose largest value is 448 has scale byte 127; one of 450 has 128, and its
    value is 225.0 rounded to e4m3, 224.
    """
    if x_TH.is_cuda:
        from sglang_moelb.kernels.quantise_rows import kernel

        return kernel.quantise_rows_ue8m0(x_TH)
    return ref.quantise_rows_ue8m0(x_TH)
