"""The nouns of a calibration.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moelb.placement import ExpertBytes
from sglang_moelb.types import FloatArray, IntArray


class CalibrateError(ValueError):
    """A calibration was asked for that cannot be done; the message names the option and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """Rows of the passes that are calibrated on, and how many passes the trace held for that."""

    rows_LE: IntArray
    num_passes: int
    num_passes_read: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """What each expert is worth, comparable over layers, and how it was measured."""

    values_LE: FloatArray
    measure: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint says of its experts: sizes, bytes of one, and Wanda's scores without rows.

    `scores_LE` are sums of |weight| times the root mean square of its input channel.
    """

    num_layers: int
    num_experts: int
    expert_bytes: ExpertBytes
    scores_LE: FloatArray
