"""The pass whose loads by rank and layer the live view shows.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_moelb.ep.build_record import routed_rank_rows
from sglang_moelb.live.heat import heat_of
from sglang_moelb.types import StepRecord, Topology


class ShownPass:
    """The last pass that was large enough for a lever; or the last, where no recent one was.

    `num_recent` is how many passes the status keeps: the shown one is always among them.
    """

    def __init__(self, topology: Topology, num_recent: int) -> None:
        self._num_ranks = topology.num_ranks
        self._num_recent = num_recent
        self._record: StepRecord | None = None
        self._num_since = 0

    def add(self, record: StepRecord) -> bool:
        """Take in a pass; whether it is the one to show. Keeps a reference to it if so."""
        self._num_since += 1
        shown = self._record
        is_old = shown is None or self._num_since >= self._num_recent
        if is_old or _is_large(record) or (shown is not None and not _is_large(shown)):
            self._record, self._num_since = record, 0
            return True
        return False

    def heat(self) -> dict[str, Any] | None:
        """Its map as plain JSON types, see `live.heat`; None before the first pass."""
        record = self._record
        if record is None:
            return None
        before_LR = routed_rank_rows(record.rows_LEM, self._num_ranks)
        heat: dict[str, Any] = msgspec.to_builtins(
            heat_of(record.step, before_LR, record.rows_after_LR)
        )
        return heat


def _is_large(record: StepRecord) -> bool:
    return bool(record.num_tokens_R.sum() >= record.policy.min_batch_tokens)
