"""Triton kernel of `widen_candidates`: a program takes the best of a tile of tokens, repeatedly.

Scores are compared as 64-bit integers, score bits above the distance from the last local expert,
so that ties go to the lower id.

Example: K = 1, local experts 1..3, num_extra 2: a token with scores [.5, .125, .25, .125], id [0]
and weight [1.] has s = 1/.5 = 2. Its candidates are 2 (.25) and 1 (.125, which ties with 3): ids
[0, 2, 1], weights [1., .5, .25].

Shape letters: T tokens, K top-k, E experts, C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.kernels.widen_candidates.ref import check_local

TILE_SCORES = 1024

FLAG_PROTECTED = tl.constexpr(row_layout.FLAG_PROTECTED)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["num_tokens", "ids_stride", "weights_stride", "scores_stride"])
def _widen(
    ids_ptr,
    weights_ptr,
    scores_ptr,
    flags_ptr,
    new_ids_ptr,
    new_weights_ptr,
    num_tokens,
    ids_stride,
    weights_stride,
    scores_stride,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    FIRST_LOCAL: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_LOCAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    is_token = token < num_tokens
    place = tl.arange(0, TILE_LOCAL)[None, :]
    inside = is_token[:, None] & (place < NUM_LOCAL)
    scores_at = scores_ptr + token * scores_stride
    scores = tl.load(scores_at[:, None] + FIRST_LOCAL + place, mask=inside, other=0.0)

    flags = tl.load(flags_ptr + token, mask=is_token, other=0)
    first = tl.load(ids_ptr + token * ids_stride, mask=is_token, other=-1)
    has_first = (first >= 0) & (first < NUM_EXPERTS)
    score = tl.load(scores_at + first, mask=has_first, other=0.0)
    weight = tl.load(weights_ptr + token * weights_stride, mask=is_token, other=0.0)
    scale = tl.div_rn(weight, tl.where(score > 0, score, 1.0))
    allowed = (score > 0) & (scale > 0) & (scale < INFINITY) & ((flags & FLAG_PROTECTED) == 0)

    free = inside & allowed[:, None] & (scores > 0)
    new_ids_at = new_ids_ptr + token * (TOPK + NUM_EXTRA)
    new_weights_at = new_weights_ptr + token * (TOPK + NUM_EXTRA)
    for k in range(TOPK):
        ids = tl.load(ids_ptr + token * ids_stride + k, mask=is_token, other=-1)
        weights = tl.load(weights_ptr + token * weights_stride + k, mask=is_token, other=0.0)
        tl.store(new_ids_at + k, ids, mask=is_token)
        tl.store(new_weights_at + k, weights, mask=is_token)
        free = free & (ids[:, None] != FIRST_LOCAL + place)

    rank = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (TILE_LOCAL - 1 - place)
    rank = tl.where(free, rank, -1)
    for x in range(NUM_EXTRA):
        best = tl.max(rank, axis=1)
        found = best >= 0
        at = TILE_LOCAL - 1 - (best & (TILE_LOCAL - 1)).to(tl.int32)
        best_score = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        extra = tl.where(found, FIRST_LOCAL + at, -1)
        extra_weight = tl.where(found, best_score * scale, 0.0)
        tl.store(new_ids_at + TOPK + x, extra, mask=is_token)
        tl.store(new_weights_at + TOPK + x, extra_weight, mask=is_token)
        rank = tl.where(rank == best[:, None], -1, rank)


def widen_candidates(
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    flags_T: Tensor,
    *,
    first_local: int,
    num_local: int,
    num_extra: int,
) -> tuple[Tensor, Tensor]:
    """See `sglang_moelb.kernels.widen_candidates`. Runs on the device of its tensors, no sync."""
    num_tokens, topk = ids_TK.shape
    num_experts = scores_TE.shape[1]
    check_local(num_experts, first_local, num_local)
    shape = (num_tokens, topk + num_extra)
    ids_TC = torch.empty(shape, dtype=ids_TK.dtype, device=ids_TK.device)
    weights_TC = torch.empty(shape, dtype=torch.float32, device=ids_TK.device)
    if num_tokens == 0:
        return ids_TC, weights_TC
    ids_TK = ids_TK if ids_TK.stride(1) == 1 else ids_TK.contiguous()
    weights_TK = weights_TK if weights_TK.stride(1) == 1 else weights_TK.contiguous()
    scores_TE = scores_TE if scores_TE.stride(1) == 1 else scores_TE.contiguous()
    tile_local = triton.next_power_of_2(max(num_local, 1))
    tile_tokens = max(1, TILE_SCORES // tile_local)
    _widen[(triton.cdiv(num_tokens, tile_tokens),)](
        ids_TK,
        weights_TK,
        scores_TE,
        flags_T,
        ids_TC,
        weights_TC,
        num_tokens,
        ids_TK.stride(0),
        weights_TK.stride(0),
        scores_TE.stride(0),
        NUM_EXPERTS=num_experts,
        TOPK=topk,
        FIRST_LOCAL=first_local,
        NUM_LOCAL=num_local,
        NUM_EXTRA=num_extra,
        TILE_TOKENS=tile_tokens,
        TILE_LOCAL=tile_local,
        num_warps=4,
    )
    return ids_TC, weights_TC
