"""What a row costs at low precision beside one at the model's own, learned while serving.

Small groups of rows gain nothing from low precision: their GEMM waits for weights, which are
converted first and then read. So the cost depends on the rows that an expert has.

Shape letters: L MoE layers, R ranks, N measured times of a rank, G layers that one of them is over,
B buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sglang_moelb.types import FloatArray, IntArray, Topology

if TYPE_CHECKING:
    from sglang_moelb.controller.cost import CostModel
    from sglang_moelb.controller.rank_times import RankTimes

# Measured on an H100 with DeepGEMM, both projections of 32 experts, 2048 x 768: 1.0 at 512 rows an
# expert, 0.72 at 2,048 and 0.66 at 4,096.
PRIOR_ROWS = (512.0, 2048.0, 4096.0)
PRIOR_COST = (1.0, 0.72, 0.66)
BUCKETS = 24  # a power of two of rows an expert each
PRIOR_LAYERS = 4.0  # so many measured layers weigh as much as the prior
FORGETTING = 0.98
MIN_LOW_SHARE = 0.5  # of a rank's rows


@dataclass(frozen=True, kw_only=True, slots=True)
class LowCost:
    """Sums of measured cost and of layers, by power of two of rows an expert, with forgetting."""

    cost_B: tuple[float, ...] = (0.0,) * BUCKETS
    layers_B: tuple[float, ...] = (0.0,) * BUCKETS

    def updated(self, times: RankTimes, topology: Topology, cost: CostModel) -> LowCost:
        """With what one rank took in a pass, against what `cost` says of its own precision.

        A time counts if at least half of its rows ran low, and by as many layers as had low rows;
        a rank of which less ran low would say more of the fit than of low rows. Times that are not
        finite, not positive or outliers are ignored. Runs on the host. Ours.
        """
        low_N, rows_N = times.low_NG.sum(axis=1), times.rows_NG.sum(axis=1)
        plain_N = times.plain_ms(cost.fixed_ms, cost.ms_per_row)
        known_N = (low_N > 0) & (low_N >= MIN_LOW_SHARE * rows_N) & times.usable(plain_N)
        if cost.ms_per_row <= 0.0 or not known_N.any():
            return self
        has_low_NG = times.low_NG > 0
        num_layers_N = has_low_NG.sum(axis=1)[known_N]
        mean_rows_N = (times.rows_NG * has_low_NG).sum(axis=1)[known_N] / num_layers_N
        bucket_N = _bucket(mean_rows_N / topology.experts_per_rank)
        cost_N = 1.0 - (plain_N - times.ms_N)[known_N] / (cost.ms_per_row * low_N[known_N])
        costs_B = np.bincount(bucket_N, weights=cost_N * num_layers_N, minlength=BUCKETS)
        layers_B = np.bincount(bucket_N, weights=num_layers_N, minlength=BUCKETS)
        keep_B = np.where(layers_B > 0, FORGETTING, 1.0)
        return LowCost(
            cost_B=tuple((keep_B * self.cost_B + costs_B).tolist()),
            layers_B=tuple((keep_B * self.layers_B + layers_B).tolist()),
        )

    def of(self, rows_LR: IntArray, topology: Topology) -> FloatArray:
        """Cost of a row at low precision on each rank, float64 of the shape of `rows_LR`.

        1.0 is that of the model's own precision; above 1 where low precision is slower. Runs on
        the host. Ours.
        """
        per_expert_LR = np.maximum(rows_LR / topology.experts_per_rank, 1.0)
        prior_LR = np.interp(np.log2(per_expert_LR), [math.log2(n) for n in PRIOR_ROWS], PRIOR_COST)
        bucket_LR = _bucket(per_expert_LR)
        measured_LR = np.array(self.cost_B)[bucket_LR]
        layers_LR = np.array(self.layers_B)[bucket_LR]
        cost_LR: FloatArray = (PRIOR_LAYERS * prior_LR + measured_LR) / (PRIOR_LAYERS + layers_LR)
        return cost_LR

    def effective(self, rows_LR: IntArray, low_LR: IntArray, topology: Topology) -> FloatArray:
        """Rows at the model's own precision that take as long, float64 [L, R].

        `low_LR` of the rows `rows_LR` run at low precision. Runs on the host. Ours.
        """
        effective_LR: FloatArray = rows_LR - low_LR * (1.0 - self.of(rows_LR, topology))
        return effective_LR


def _bucket(per_expert: FloatArray) -> IntArray:
    power = np.floor(np.log2(np.maximum(per_expert, 1.0))).astype(np.int64)
    bucket: IntArray = np.minimum(power, BUCKETS - 1)
    return bucket
