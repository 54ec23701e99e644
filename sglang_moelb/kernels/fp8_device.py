"""The number format of `fp8.py` in Triton: what the kernels that quantise share.

A cast rounds to nearest even on a device; one to float8e4nv saturates Inf and keeps NaN besides.
Triton's interpreter cuts off and does not carry (Triton 3.7.1), and gets values that are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_moelb.kernels import fp8

GROUP = tl.constexpr(fp8.GROUP)
FP8_MAX = tl.constexpr(fp8.FP8_MAX)
MIN_AMAX = tl.constexpr(fp8.MIN_AMAX)
TINY = tl.constexpr(fp8.TINY)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

SIGN_BIT = tl.constexpr(-(2**31))
EXPONENT_MASK = tl.constexpr(0x7F800000)
SMALLEST_NORMAL = tl.constexpr(2.0**-6)  # of e4m3fn; below it steps stay equal
NAN_BITS = tl.constexpr(0x7FF00000)  # cut off after 3 bits of mantissa it is the NaN of e4m3fn
TO_ROUNDER = tl.constexpr((23 - 3) << 23)  # e4m3fn has 3 bits of mantissa, float32 has 23


@triton.jit
def scale_of(amax):
    """The scale of groups with these largest values, and its inverse; NaN in amax counts as 0."""
    scale = tl.div_rn(tl.where(amax > MIN_AMAX, amax, MIN_AMAX), FP8_MAX)
    tiny = tl.full([], TINY, tl.float32)  # a bare subnormal number would be a float64
    return scale, tl.maximum(tl.div_rn(1.0, scale), tiny)


@triton.jit
def to_fp8(value):
    """float32 to float8e4nv, saturating; NaN stays NaN."""
    if INTERPRETED:
        value = _round(value)
    return value.to(tl.float8e4nv)


@triton.jit
def round_to_bf16(value):
    """float32 rounded to the nearest bfloat16, as float32; NaN stays NaN."""
    if INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    else:
        rounded = value.to(tl.bfloat16).to(tl.float32)
    return rounded


@triton.jit
def _round(value):
    magnitude = tl.minimum(tl.abs(value), FP8_MAX)
    # Adding 2**20 times a value's power of two leaves no bits below its 3 bits of mantissa.
    power = tl.maximum(magnitude, SMALLEST_NORMAL).to(tl.int32, bitcast=True) & EXPONENT_MASK
    rounder = (power + TO_ROUNDER).to(tl.float32, bitcast=True)
    rounded = ((magnitude + rounder) - rounder).to(tl.int32, bitcast=True)
    rounded = rounded | (value.to(tl.int32, bitcast=True) & SIGN_BIT)
    rounded = tl.where(value == value, rounded, NAN_BITS)
    return rounded.to(tl.float32, bitcast=True)
