"""Triton kernels of `token_amounts`: the entropy of each visual token, then its weight.

Two launches. Every program of the second sums all entropies again, in the same order, so that no
float atomic makes a run differ from another; 16,384 of them are 64 KB out of L2.

Example: delta 1, D = 2, three valid tokens:

    hidden       flag          entropy   normalised   amount
    [0, 0]       FLAG_VISION   ln 2        1          floor(256 * .2689 + .5) = 69
    [100, 0]     FLAG_VISION   0          -1          floor(256 * .7311 + .5) = 187
    [5, 5]       text                                 256

Shape letters: T tokens, D hidden features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.token_amounts import ref

MAX_TILE_FEATURES = 4096
TILE_TOKENS = 1024

AMOUNT_ONE = tl.constexpr(row_layout.AMOUNT_ONE)
FLAG_VISION = tl.constexpr(row_layout.FLAG_VISION)
EPS = tl.constexpr(ref.EPS)
INFINITY = tl.constexpr(float("inf"))
NOT_VISUAL = tl.constexpr(-1.0)  # entropies are at least 0


@triton.jit(do_not_specialize=["hidden_stride"])
def _entropies(
    hidden_ptr,
    flags_ptr,
    valid_ptr,
    entropy_ptr,
    hidden_stride,
    WIDTH: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    is_visual = (tl.load(flags_ptr + token) & FLAG_VISION) != 0
    is_visual = is_visual & (tl.load(valid_ptr + token) != 0)
    entropy = NOT_VISUAL
    if is_visual:
        feature = tl.arange(0, TILE_FEATURES)
        hidden_at = hidden_ptr + token * hidden_stride
        largest = tl.full([TILE_FEATURES], -INFINITY, tl.float32)
        for start in range(0, WIDTH, TILE_FEATURES):
            inside = start + feature < WIDTH
            state = tl.load(hidden_at + start + feature, mask=inside, other=-INFINITY)
            largest = tl.maximum(largest, state.to(tl.float32))
        top = tl.max(largest, axis=0)
        exps = tl.zeros([TILE_FEATURES], tl.float32)
        products = tl.zeros([TILE_FEATURES], tl.float32)
        for start in range(0, WIDTH, TILE_FEATURES):
            inside = start + feature < WIDTH
            state = tl.load(hidden_at + start + feature, mask=inside, other=0.0)
            shifted = state.to(tl.float32) - top
            exp = tl.where(inside, tl.exp(shifted), 0.0)
            exps += exp
            products += tl.where(inside, exp * shifted, 0.0)
        total = tl.sum(exps, axis=0)
        value = tl.log(total) - tl.sum(products, axis=0) / total
        value = tl.where(value < 0, 0.0, value)
        entropy = tl.where(value < INFINITY, value, NOT_VISUAL)  # NaN is not below it either
    tl.store(entropy_ptr + token, entropy)


@triton.jit(do_not_specialize=["num_tokens", "delta"])
def _weigh(entropy_ptr, amounts_ptr, num_tokens, delta, TILE_TOKENS: tl.constexpr):
    count = tl.zeros([TILE_TOKENS], tl.int32)
    sums = tl.zeros([TILE_TOKENS], tl.float64)
    for start in range(0, num_tokens, TILE_TOKENS):
        token = start + tl.arange(0, TILE_TOKENS)
        entropy = tl.load(entropy_ptr + token, mask=token < num_tokens, other=NOT_VISUAL)
        count += (entropy >= 0).to(tl.int32)
        sums += tl.where(entropy >= 0, entropy, 0.0).to(tl.float64)
    number = tl.maximum(tl.sum(count), 1).to(tl.float64)
    mean = tl.sum(sums) / number
    squares = tl.zeros([TILE_TOKENS], tl.float64)
    for start in range(0, num_tokens, TILE_TOKENS):
        token = start + tl.arange(0, TILE_TOKENS)
        entropy = tl.load(entropy_ptr + token, mask=token < num_tokens, other=NOT_VISUAL)
        error = tl.where(entropy >= 0, entropy.to(tl.float64) - mean, 0.0)
        squares += error * error
    std = tl.sqrt(tl.sum(squares) / number)

    token = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    inside = token < num_tokens
    entropy = tl.load(entropy_ptr + token, mask=inside, other=NOT_VISUAL)
    normal = ((entropy.to(tl.float64) - mean) / (std + EPS)).to(tl.float32)
    weight = 1.0 / (1.0 + tl.exp(normal * delta))
    units = tl.floor(weight * AMOUNT_ONE + 0.5).to(tl.int32)
    units = tl.minimum(tl.maximum(units, 1), AMOUNT_ONE)
    tl.store(amounts_ptr + token, tl.where(entropy >= 0, units, AMOUNT_ONE), mask=inside)


def token_amounts(hidden_TD: Tensor, flags_T: Tensor, valid_T: Tensor, *, delta: float) -> Tensor:
    """See `sglang_moelb.kernels.token_amounts`. Runs on the device of its tensors, no sync."""
    num_tokens, width = hidden_TD.shape
    amounts_T = torch.empty(num_tokens, dtype=torch.int32, device=hidden_TD.device)
    if num_tokens == 0:
        return amounts_T
    hidden_TD = hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous()
    entropy_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
    tile_features = min(triton.next_power_of_2(width), MAX_TILE_FEATURES)
    _entropies[(num_tokens,)](
        hidden_TD,
        flags_T,
        valid_T.view(torch.uint8),
        entropy_T,
        hidden_TD.stride(0),
        WIDTH=width,
        TILE_FEATURES=tile_features,
        num_warps=4,
    )
    _weigh[(triton.cdiv(num_tokens, TILE_TOKENS),)](
        entropy_T, amounts_T, num_tokens, float(delta), TILE_TOKENS=TILE_TOKENS, num_warps=8
    )
    return amounts_T
