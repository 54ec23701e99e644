"""Skewed routings for the benchmarks of replicas: rows by source rank and expert, and ids.

Shape letters: R ranks, E experts, T tokens, K top-k, W row width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout
from sglang_moelb.types import FloatArray, IntArray

TOPK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingCase:
    """How tokens choose: one hot rank, one hot expert, or zipf with the hottest all on rank 0.

    `strength` is the hot rank's load over the mean, the hot expert's share of all rows, or zipf's
    exponent.
    """

    kind: Literal["rank", "expert", "zipf"]
    strength: float
    num_ranks: int = 4
    num_experts: int = 128

    @property
    def name(self) -> str:
        """Kind and strength."""
        return f"{self.kind} {self.strength:g}"


CASES = (
    *(RoutingCase(kind="rank", strength=skew) for skew in (1.0, 1.5, 2.0, 3.0, 4.0)),
    RoutingCase(kind="expert", strength=0.3),
    RoutingCase(kind="rank", strength=3.0, num_ranks=8, num_experts=256),
    RoutingCase(kind="rank", strength=3.0, num_ranks=64, num_experts=256),
    RoutingCase(kind="expert", strength=0.3, num_ranks=64, num_experts=256),
    RoutingCase(kind="zipf", strength=0.8, num_ranks=64, num_experts=256),
)


def weights(case: RoutingCase, seed: int = 0) -> FloatArray:
    """Probability of each expert, float64 [E], zipf-like inside every rank."""
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = case.num_ranks, case.num_experts
    if case.kind == "zipf":
        weight_E = np.arange(1, num_experts + 1) ** -case.strength
        return np.asarray(weight_E / weight_E.sum())
    if case.kind == "expert":
        weight_E = np.full(num_experts, (1 - case.strength) / (num_experts - 1))
        weight_E[num_experts // 3] = case.strength
        return weight_E
    inside_Re = rng.permutation(np.arange(1, num_experts + 1) ** -0.5).reshape(num_ranks, -1)
    share_R = np.full(num_ranks, (num_ranks - case.strength) / (num_ranks - 1))
    share_R[num_ranks // 3] = case.strength
    weight_Re = inside_Re / inside_Re.sum(axis=1, keepdims=True) * share_R[:, None]
    return np.asarray(weight_Re.ravel() / num_ranks)


def expert_rows(case: RoutingCase, num_tokens: int, seed: int = 0) -> IntArray:
    """Rows of `num_tokens` tokens a rank, int64 [R, E]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_tokens * TOPK, weights(case, seed), size=case.num_ranks)


def make_rows(rows_RE: IntArray) -> Tensor:
    """Rows as `count_experts` lays them out, all text, int32 [R, W] on the host."""
    num_ranks, num_experts = rows_RE.shape
    width = row_layout.row_width(num_experts, with_histogram=False)
    rows_RW = torch.zeros(num_ranks, width, dtype=torch.int32)
    counts_RE5 = row_layout.counts_of(rows_RW, num_experts)
    counts_RE5[..., row_layout.C_TEXT_ROWS] = torch.from_numpy(rows_RE.astype(np.int32))
    return rows_RW


def routed_ids(case: RoutingCase, num_tokens: int, seed: int = 0) -> Tensor:
    """Distinct ids of each token, drawn by the weights of the experts, int64 [T, K] on the host.

    No expert can have more than a row a token, so what would be more goes to the next ones.
    """
    rng = np.random.default_rng(seed)
    noise_TE = rng.gumbel(size=(num_tokens, case.num_experts))
    score_TE = noise_TE + np.log(np.maximum(weights(case, seed), 1e-12))
    best_TK = np.argpartition(-score_TE, TOPK, axis=1)[:, :TOPK]
    return torch.from_numpy(best_TK)
