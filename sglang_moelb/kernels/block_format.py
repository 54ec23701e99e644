"""Block-scaled low-precision formats in plain torch: their definitions, bit by bit.

A block is B consecutive elements along the last axis that share a scale of one byte. Elements are
e2m1 codes (0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; bit 3 is the sign), two a byte, the
first in the low bits, or e4m3 bytes. A value is element * scale, in NVFP4 times a float32 `global`.

Shape letters: B elements of a block, E local experts, K features, N output features, T rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from sglang_moelb.kernels.scale_layout import ScaleLayout, to_layout, to_row_major

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Half-way points between neighbours; a tie goes to the even code.
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0
FLOAT32_MAX = torch.finfo(torch.float32).max
SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))
E8M0_NAN, E4M3_NAN = 0xFF, 0x7F


class BlockFormat(Enum):
    """MXFP4, MXFP8: OCP Microscaling v1.0, section 6.3: scale 2**(floor(log2 amax) - emax), emax 2
    for e2m1 and 8 for e4m3. MXFP4_CEIL: the smallest power of two that keeps amax within 6, which
    is DeepGEMM's, FlashInfer's and SGLang's MXFP4. NVFP4: NVIDIA's, as Transformer Engine and
    FlashInfer (without fast math) compute it.
    """

    MXFP4 = "mxfp4"
    MXFP4_CEIL = "mxfp4_ceil"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"

    @property
    def block_size(self) -> int:
        """B."""
        return 16 if self is BlockFormat.NVFP4 else 32

    @property
    def codes_per_byte(self) -> int:
        """2 for e2m1, 1 for e4m3."""
        return 1 if self is BlockFormat.MXFP8 else 2

    @property
    def has_global(self) -> bool:
        """Whether values carry a float32 beside the block scale."""
        return self is BlockFormat.NVFP4


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScaled:
    """A tensor (..., K) in a block format.

    `codes` uint8 (..., K / codes_per_byte); `scales` uint8 (..., K / B), e8m0 bits (byte b is
    2**(b - 127), 255 NaN) or for NVFP4 e4m3 bits; `globals` float32, one for each entry of the
    first axis (an expert of weights, a row of activations), None where the format has none.
    `layout` is that of `scales`, whose shape and dtype are `scale_layout.to_layout`'s.
    """

    format: BlockFormat
    codes: Tensor
    scales: Tensor
    globals: Tensor | None = None
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR


def empty_block_scaled(
    shape: tuple[int, ...],
    block_format: BlockFormat,
    device: torch.device | str,
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
) -> BlockScaled:
    """Room for a tensor of `shape`, zero, padding too: a staging slot. `globals` are 1.

    Raises:
        ValueError: the last axis is no multiple of the block.
    """
    check_width(shape[-1], block_format)
    rows, width = shape[:-1], shape[-1]
    codes_shape = (*rows, width // block_format.codes_per_byte)
    scales = torch.zeros(*rows, width // block_format.block_size, dtype=torch.uint8, device=device)
    return BlockScaled(
        format=block_format,
        codes=torch.zeros(codes_shape, dtype=torch.uint8, device=device),
        scales=to_layout(scales, layout),
        globals=torch.ones(shape[0], device=device) if block_format.has_global else None,
        layout=layout,
    )


def check_width(width: int, block_format: BlockFormat) -> None:
    """ValueError unless rows of `width` elements are whole blocks. Host only."""
    if width % block_format.block_size:
        raise ValueError(
            f"{width} features are no multiple of {block_format.value}'s block of "
            f"{block_format.block_size}; pad the last axis"
        )


def e2m1_codes(x: Tensor) -> Tensor:
    """uint8 codes of float32 values: nearest, ties to even, beyond 6 saturated, sign kept on 0."""
    magnitude = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for below, tie in enumerate(E2M1_TIES):
        codes += (magnitude >= tie) if below % 2 else (magnitude > tie)
    return codes | (x.signbit().byte() << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes 0..15, -0.0 for code 8."""
    table = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
    return torch.tensor(table, device=codes.device)[codes.long()]


def e4m3_bits(x: Tensor) -> Tensor:
    """uint8 bits of float32 values: nearest, ties to even, saturated at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_values(bits: Tensor) -> Tensor:
    """float32 values of uint8 bits."""
    return bits.view(torch.float8_e4m3fn).float()


def e8m0_values(scales: Tensor) -> Tensor:
    """float32 2**(byte - 127) of uint8 bytes, NaN for 255; byte 0 is a float32 subnormal."""
    bits = (scales.int() << 23).where(scales != 0, 1 << 22)
    return bits.view(torch.float32).where(scales != E8M0_NAN, torch.nan)


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 (..., K) codes 0..15 to (..., K/2) bytes, the first of a pair in the low bits."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse of `pack_pairs`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def block_amax(x: Tensor, block_size: int) -> Tensor:
    """float32 (..., K/B): largest magnitude of each block, inf where one holds NaN or inf."""
    amax: Tensor = x.float().unflatten(-1, (-1, block_size)).abs().amax(-1)
    return amax.where(amax.isfinite(), torch.inf)


def global_scales(x: Tensor, *, per_tensor: bool = False) -> Tensor:
    """float32 (E,): NVFP4's `globals`, amax / (448 * 6) of each entry of the first axis.

    Blocks with NaN or inf count as 0; an amax of 0 gives 1. `per_tensor` repeats the largest, for
    a GEMM that takes one scale for all experts. Runs wherever `x` is, in float32.
    """
    amax = block_amax(x, BlockFormat.NVFP4.block_size)
    amax = amax.where(amax.isfinite(), 0).flatten(1).amax(1) if x.numel() else x.new_zeros(len(x))
    if per_tensor and len(amax):
        amax = amax.amax().expand_as(amax)
    amax = amax.float()
    largest = amax.new_full((), E4M3_MAX * E2M1_MAX)  # torch divides by a number less exactly
    return (amax / largest).where(amax > 0, 1.0).contiguous()


def block_scales(amax: Tensor, globals_: Tensor | None, block_format: BlockFormat) -> Tensor:
    """uint8 scales of blocks with the given `amax`; a block with NaN or inf gets NaN.

    `globals_` is float32 and broadcasts against `amax`.
    """
    if block_format.has_global:
        assert globals_ is not None
        bits = e4m3_bits(amax * (_encoder(globals_) * SIXTH))
        return bits.where(amax.isfinite(), E4M3_NAN)
    emax = 8 if block_format is BlockFormat.MXFP8 else 2
    exponent = amax.view(torch.int32) >> 23
    if block_format is BlockFormat.MXFP4_CEIL:
        exponent = exponent + ((amax.view(torch.int32) & 0x7FFFFF) > 0x400000).int()
    return (exponent - emax).clamp(min=0).byte().where(amax.isfinite(), E8M0_NAN)


def _encoder(globals_: Tensor) -> Tensor:
    return (1 / globals_).clamp(max=FLOAT32_MAX)


def quantise_blocks(
    x: Tensor, globals_: Tensor | None, block_format: BlockFormat
) -> tuple[Tensor, Tensor]:
    """`codes` and `scales` of `BlockScaled` for x (..., K), bfloat16 or float32.

    A block with NaN or inf gets scale NaN and codes 0, so that all that uses it is NaN. A block of
    zeros gets scale 0 and codes 0 or -0. `globals_` float32 (len(x),) for NVFP4. Host or device.
    """
    check_width(x.shape[-1], block_format)
    if globals_ is not None:
        globals_ = globals_.view(-1, *[1] * (x.dim() - 1))
    amax = block_amax(x, block_format.block_size)
    scales = block_scales(amax, globals_, block_format)
    if block_format.has_global:
        assert globals_ is not None
        # Transformer Engine's order of roundings: three divisions and a product, none fused.
        factor = (1 / (e4m3_values(scales) * (1 / _encoder(globals_)))).clamp(max=FLOAT32_MAX)
        factor = factor.where(amax > 0, 0.0)
    else:
        factor = ((254 - scales.int()) << 23).view(torch.float32)  # 2**(127 - byte)
    scaled = x.float().unflatten(-1, (-1, block_format.block_size)) * factor[..., None]
    scaled = scaled.where(amax.isfinite()[..., None], 0.0).flatten(-2)
    is_fp8 = block_format is BlockFormat.MXFP8
    return e4m3_bits(scaled) if is_fp8 else pack_pairs(e2m1_codes(scaled)), scales


def dequantise(x: BlockScaled) -> Tensor:
    """float32 values of `x`: element times scale, exact, then times `globals` where it has them."""
    is_nvfp4, is_fp8 = x.format.has_global, x.format is BlockFormat.MXFP8
    elements = e4m3_values(x.codes) if is_fp8 else e2m1_values(unpack_pairs(x.codes))
    num_scales = elements.shape[-1] // x.format.block_size
    stored = to_row_major(x.scales, x.layout, elements.shape[-2], num_scales)
    scales = e4m3_values(stored) if is_nvfp4 else e8m0_values(stored)
    values: Tensor = elements.unflatten(-1, (-1, x.format.block_size)) * scales[..., None]
    if x.globals is not None:
        values = values * x.globals.view(-1, *[1] * (values.dim() - 1))
    return values.flatten(-2)


def fake_quantise_fp4(weights: Tensor, block_format: BlockFormat) -> Tensor:
    """Weights (E, ..., K) to `block_format` and back to their dtype, for FP4 by emulation.

    In bfloat16 the MX formats come back exactly; NVFP4's product with `globals` is rounded to 8
    bits, which adds at most 2**-8 relative. Runs wherever `weights` are, expert by expert, so that
    a layer takes no float32 copy.
    """
    result = torch.empty_like(weights)
    for expert in range(len(weights)):
        part = weights[expert : expert + 1]
        globals_ = global_scales(part) if block_format.has_global else None
        codes, scales = quantise_blocks(part, globals_, block_format)
        result[expert] = dequantise(
            BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_)
        )[0]
    return result
