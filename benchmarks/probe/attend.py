"""Attention within the segments of a packed row of tokens: prompts or images.

`varlen` is flash attention over cumulative lengths (CUDA, bf16); `padded` is scaled dot product
attention over segments padded to powers of two, group by group (any device).

Shape letters: T tokens, A heads, G key-value heads, D head size, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

Backend = Literal["varlen", "padded"]
Groups = tuple[tuple[Tensor, Tensor], ...]
SMALLEST_GROUP = 16


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a packed row; `ends` on the device, the rest on the host."""

    ends_S: Tensor  # int32, S + 1 cumulative lengths
    longest: int
    groups: Groups  # padded only: [S, L] places and [S, L] which exist


def group_segments(lengths_S: NDArray[np.int64], device: torch.device) -> Groups:
    """Segments of like length together: places in the packed row, and which of them exist."""
    starts_S = np.concatenate([[0], np.cumsum(lengths_S)[:-1]])
    widths_S = np.maximum(SMALLEST_GROUP, 2 ** np.ceil(np.log2(np.maximum(lengths_S, 1))))
    groups = []
    for width in np.unique(widths_S):
        chosen = widths_S == width
        offset = np.arange(min(int(width), int(lengths_S[chosen].max())))
        exists = offset < lengths_S[chosen][:, None]
        places = np.where(exists, starts_S[chosen][:, None] + offset, 0)
        groups.append((torch.from_numpy(places).to(device), torch.from_numpy(exists).to(device)))
    return tuple(groups)


def attend(
    q_TAD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    segments: Segments,
    *,
    causal: bool,
    backend: Backend,
) -> Tensor:
    """[T, A, D]: softmax attention within each segment, scaled by the root of the head size."""
    repeats = q_TAD.shape[1] // k_TGD.shape[1]
    if repeats > 1:
        k_TGD, v_TGD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    if backend == "padded":
        return _padded(q_TAD, k_TGD, v_TGD, segments, causal)
    ends, longest = segments.ends_S, segments.longest
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q_TAD, k_TGD, v_TGD, ends, ends, longest, longest, window_size=window)
    assert isinstance(out, Tensor)
    return out


def _padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    out = torch.zeros_like(q)
    for places, exists in segments.groups:
        mask = exists[:, None, None, :]
        if causal:
            width = places.shape[1]
            mask = mask & torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
        q_, k_, v_ = (x[places].transpose(1, 2) for x in (q, k, v))
        result = functional.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask)
        result = result.transpose(1, 2)
        out = out.index_put((places[exists],), result[exists])
    return out
