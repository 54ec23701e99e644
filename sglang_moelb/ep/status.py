"""What a server says about itself: totals and recent passes, as plain JSON types.

The controller process counts; the serving process keeps the rows that it is sent and shows them.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_moelb.ep.build_record import routed_rank_rows
from sglang_moelb.ep.shown_pass import ShownPass
from sglang_moelb.types import Effects, Lever, StepRecord, Topology

NUM_RECENT = 64


class Ledger:
    """Sums over all passes, and the row of the last one."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._newest: dict[str, Any] = {}
        self._by_lever = {lever.name.lower(): 0 for lever in Lever}
        self._sums: dict[str, float] = dict.fromkeys(
            ("routed_mass", "lost_mass", "moved_mass", "num_dropped_rows", "num_added_rows"), 0
        )
        self._num_low_rows = 0
        self._num_copies = 0
        self._num_passes = 0
        self._num_prefill = 0
        self._shown = ShownPass(topology, NUM_RECENT)
        self._is_shown = False

    def add(self, record: StepRecord, effects: Effects) -> None:
        """Count one pass."""
        self._num_passes += 1
        self._num_prefill += record.phase == "prefill"
        self._by_lever[record.used_lever.name.lower()] += 1
        for name in self._sums:
            self._sums[name] += getattr(record, name)
        if record.low_rows_LR is not None:
            self._num_low_rows += int(record.low_rows_LR.sum())
        if record.num_copies_LR is not None:
            self._num_copies += int(record.num_copies_LR.sum())
        self._newest = self._row(record)
        self._is_shown = self._shown.add(record)

    def totals(self) -> dict[str, Any]:
        """Sums since the start."""
        return {
            "num_passes": self._num_passes,
            "num_prefill_passes": self._num_prefill,
            "num_passes_by_lever": dict(self._by_lever),
            **self._sums,
            "num_low_rows": self._num_low_rows,
            "num_copies": self._num_copies,
        }

    def newest(self) -> dict[str, Any]:
        """The last pass."""
        return self._newest

    def heat(self) -> dict[str, Any] | None:
        """Loads by rank and layer of the last pass if it is the one to show (`ep.shown_pass`)."""
        return self._shown.heat() if self._is_shown else None

    def _row(self, record: StepRecord) -> dict[str, Any]:
        before_LR = routed_rank_rows(record.rows_LEM, self._topology.num_ranks)
        after_LR, low_LR, copies_LR = (
            record.rows_after_LR, record.low_rows_LR, record.num_copies_LR
        )  # fmt: skip
        mass = max(record.routed_mass, 1e-9)
        return {
            "step": record.step,
            "phase": record.phase,
            "lever": record.used_lever.name.lower(),
            "policy_lever": record.policy.lever.name.lower(),
            "epoch": record.policy.epoch,
            "reason": record.policy.reason,
            "gate_reason": record.gate_reason,
            "num_tokens_R": record.num_tokens_R.tolist(),
            "num_vision_tokens_R": record.num_vision_tokens_R.tolist(),
            "num_protected_tokens_R": record.num_protected_tokens_R.tolist(),
            "num_refused_tokens_R": record.num_refused_tokens_R.tolist(),
            "balance_before_L": balancedness(before_LR),
            "balance_after_L": balancedness(after_LR),
            "rows_before_R": before_LR.sum(axis=0).tolist(),
            "rows_after_R": after_LR.sum(axis=0).tolist(),
            "low_ranks": low_ranks(record),
            "low_rows_R": [] if low_LR is None else low_LR.sum(axis=0).tolist(),
            "num_copies_R": [] if copies_LR is None else copies_LR.sum(axis=0).tolist(),
            "lost_share": record.lost_mass / mass,
            "moved_share": record.moved_mass / mass,
            "step_ms": round(record.step_ms, 3),
            "experts_ms": round(float(record.experts_ms_L.sum()), 3),
            "layer_ms": round(float(record.layer_ms_L.sum()), 3),
            "balance_ms": round(record.balance_ms, 3),
        }


def low_ranks(record: StepRecord) -> list[list[int]]:
    """For each layer the ranks that computed at low precision; nothing where none did."""
    if record.low_rows_LR is None or not record.low_rows_LR.any():
        return []
    return [np.flatnonzero(low_R).tolist() for low_R in record.low_rows_LR]


def balancedness(rows_LR: np.ndarray) -> list[float]:
    """max/mean over ranks for each layer; 1.0 where a layer has no rows."""
    mean_L = rows_LR.sum(axis=1) / rows_LR.shape[1]
    ratio_L = np.where(mean_L > 0, rows_LR.max(axis=1) / np.maximum(mean_L, 1e-9), 1.0)
    return [round(x, 4) for x in ratio_L.tolist()]
