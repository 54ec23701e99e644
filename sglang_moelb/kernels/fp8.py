"""Float8 e4m3 with one float32 scale a group: the number format, and its reference in plain torch.

A group is a block of 128x128 of a weight, or 128 columns of a row of activations: the granularity
of DeepGEMM's fp8 GEMMs on Hopper (`deep_gemm.utils.math`, without ue8m0), to which finite groups
are equal bit for bit. What is not finite stays what it is (ours): NaN is NaN in its place and does
not touch its group; an Inf gives its group the scale Inf and is itself +-Inf, while the finite
values beside it, which a sum with an Inf would swallow anyway, read NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128  # columns of a group, and rows too in a block of weights
FP8_MAX = 448.0  # largest e4m3fn
MIN_AMAX = 1e-4  # a smaller largest value of a group counts as this
TINY = 2.0**-149  # in place of 1/Inf: finite values times it become 0, Inf stays Inf


def quantise(x: Tensor, axes: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`x` in float8_e4m3fn, and the float32 scale of each group, which spans `axes` of x.

    scale = max(largest |x|, MIN_AMAX) / FP8_MAX, with the axes kept; fp8 = x * (1 / scale), rounded
    to nearest even; x is about fp8 * scale. Runs wherever its tensor is.
    """
    x = x.float()
    amax = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(axes, keepdim=True)
    scale = amax.clamp(min=MIN_AMAX) / FP8_MAX
    inverse = (1.0 / scale).clamp(min=TINY)
    return (x * inverse).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
