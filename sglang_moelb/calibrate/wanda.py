"""Wanda's scores of experts, |weight| times the norm of its input, from a checkpoint alone.

Wanda (arXiv 2306.11695) takes activations from a run on calibration data. Traces have rows and no
activations, so their size is derived from the checkpoint instead:

- The input of w13 is the RMS norm before the MoE layer times its weight g, so channel j has the
  root mean square |g_j|, if no channel of the hidden state is larger than the others.
- The input of w2 is silu(gate) * up. With gate and up normal and independent, of the variances
  that the rows of w13 and the |g_j| give, its root mean square follows.
- The norm over n rows is sqrt(n) times that; the rows are those of the trace.

An expert's score is the sum over both projections, divided by the mean of its layer, so that layers
can be compared. Choices of ours: R&Q says neither how it sums nor whether it divides.

Shape letters: L MoE layers, E logical experts, J = 2I gate and up, H hidden, I expert size,
N nodes of a quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sglang_moelb.calibrate.checkpoint import ExpertTensors, open_checkpoint
from sglang_moelb.calibrate.types import Checkpoint
from sglang_moelb.placement import ExpertBytes
from sglang_moelb.stored_formats import LOW_BYTES
from sglang_moelb.types import FloatArray, IntArray

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def read_checkpoint(folder: Path, *, low_format: str, score: bool, begun: Callable[[int], None],
                    tick: Callable[[], None]) -> Checkpoint:  # fmt: skip
    """Sizes of the experts in `folder`, and their scores if `score` is set (else zeros).

    `low_format` is one of `stored_formats.LOW_BYTES`. `begun` is told the number of experts to
    read, `tick` is called after each. Raises `CalibrateError` for a folder that holds no such
    checkpoint.
    """
    experts = open_checkpoint(folder)
    scores_LE = np.zeros((experts.num_layers, experts.num_experts))
    if score:
        begun(scores_LE.size)
        for layer in range(experts.num_layers):
            _score_layer(experts, layer, scores_LE, tick)
    return Checkpoint(
        num_layers=experts.num_layers,
        num_experts=experts.num_experts,
        expert_bytes=bytes_of(experts.shapes, experts.item_bytes, low_format),
        scores_LE=scores_LE,
    )


def bytes_of(
    shapes: tuple[tuple[int, int], ...], item_bytes: int, low_format: str
) -> ExpertBytes:
    """What an expert takes: as stored in the checkpoint, and in `low_format` with its scales."""
    num_weights = sum(rows * columns for rows, columns in shapes)
    return ExpertBytes(high=num_weights * item_bytes, low=LOW_BYTES[low_format](num_weights))


def importance_of(scores_LE: FloatArray, rows_LE: IntArray) -> FloatArray:
    """Scores with the norms' sqrt(rows), each layer divided by its mean, [L, E]."""
    weighted_LE = scores_LE * np.sqrt(rows_LE)
    mean_L1 = weighted_LE.mean(axis=1, keepdims=True)
    values_LE: FloatArray = weighted_LE / np.where(mean_L1 > 0, mean_L1, 1.0)
    return values_LE


def score(w13_JH: Any, w2_HI: Any, norm_H: Any) -> float:
    """Sum of |weight| times the root mean square of its input, both projections of an expert.

    Args:
        w13_JH: gate rows, then up rows. w2_HI: down projection. norm_H: weight of the norm before.
            Float32 arrays or tensors.
    """
    w13_JH, w2_HI, norm_H = (np.asarray(x, dtype=np.float32) for x in (w13_JH, w2_HI, norm_H))
    rms_H = np.abs(norm_H)
    first = float((np.abs(w13_JH) @ rms_H).sum())
    variance_J = np.square(w13_JH) @ np.square(rms_H)
    gate_I, up_I = np.split(variance_J, 2)
    rms_I = np.sqrt(silu_square(np.sqrt(gate_I)) * up_I)
    return first + float((np.abs(w2_HI) @ rms_I).sum())


def silu_square(deviation_I: FloatArray) -> FloatArray:
    """Mean of silu(x) squared for normal x with mean 0 and these deviations."""
    x_IN = deviation_I[:, None] * NODES
    mean_I: FloatArray = np.square(x_IN / (1.0 + np.exp(-x_IN))) @ WEIGHTS
    return mean_I


def _score_layer(
    experts: ExpertTensors, layer: int, scores_LE: FloatArray, tick: Callable[[], None]
) -> None:
    norm_H = experts.norm(layer)
    for expert in range(experts.num_experts):
        scores_LE[layer, expert] = score(*experts.weights(layer, expert), norm_H)
        tick()
