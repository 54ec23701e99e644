"""Block formats from their definitions, one value at a time, with no code of the package.

Shape letters: B elements of a block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction

import numpy as np

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [  # codes 0..126; 127 is NaN
    (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:127]
FLOAT32_MAX = np.finfo(np.float32).max


def nearest(value: float, magnitudes: list[float], sign_bit: int) -> int:
    """Code of the nearest magnitude, the even one of two, the largest beyond the end."""
    exact = min(abs(value), magnitudes[-1])
    code = bisect_right(magnitudes, exact) - 1
    if exact > magnitudes[code]:
        middle = (magnitudes[code] + magnitudes[code + 1]) / 2  # exact in a Python float
        code += exact > middle or (exact == middle and code % 2)
    return code | (sign_bit if math.copysign(1, value) < 0 else 0)


def exponent_of(amax: float) -> int:
    """floor(log2(amax)) of a positive number, exactly."""
    return math.frexp(amax)[1] - 1


def mx_scale(amax: float, *, name: str) -> int:
    """e8m0 byte of a block with finite `amax`."""
    if amax == 0:
        return 0
    if name == "mxfp4_ceil":
        exponent = exponent_of(amax) - 2
        if Fraction(amax) > 6 * Fraction(2) ** exponent:
            exponent += 1
    else:
        exponent = exponent_of(amax) - {"mxfp4": 2, "mxfp8": 8}[name]
    return max(exponent, -127) + 127


def block(values: list[float], *, name: str, global_scale: float = 1.0) -> tuple[list[int], int]:
    """Codes and the scale byte of one block of bfloat16 values."""
    largest, sign = (E4M3, 128) if name == "mxfp8" else (E2M1, 8)
    if not all(math.isfinite(value) for value in values):
        return [0] * len(values), 127 if name == "nvfp4" else 255
    amax = max(abs(value) for value in values)
    if name != "nvfp4":
        scale = mx_scale(amax, name=name)
        scaled = [math.ldexp(value, 127 - scale) for value in values]
        return [nearest(value, largest, sign) for value in scaled], scale
    with np.errstate(all="ignore"):
        one, sixth = np.float32(1), np.float32(1) / np.float32(6)
        encoder = min(one / np.float32(global_scale), FLOAT32_MAX)
        scale = nearest(float(np.float32(amax) * (encoder * sixth)), E4M3, 0)
        factor = min(one / (np.float32(E4M3[scale]) * (one / encoder)), FLOAT32_MAX)
        factor = factor if amax else np.float32(0)
        scaled = [float(np.clip(np.float32(value) * factor, -6, 6)) for value in values]
    return [nearest(value, largest, sign) for value in scaled], scale


def global_scale(values_B: list[list[float]]) -> np.float32:
    """NVFP4's float32 scale over blocks: those that are not finite count as 0."""
    finite = [abs(v) for values in values_B if all(map(math.isfinite, values)) for v in values]
    amax = np.float32(max(finite, default=0.0))
    return amax / np.float32(448 * 6) if amax else np.float32(1)
