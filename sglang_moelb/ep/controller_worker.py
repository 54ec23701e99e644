"""What the controller process does with a pass: record, step, publish, trace. Light: no torch.

Shape letters: R ranks, L MoE layers, E logical experts, W width of a layer's row of counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from sglang_moelb.config import Config
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.moves import Moved
from sglang_moelb.controller.recalibrate import Recalibration
from sglang_moelb.controller.resident_load import SplitRows
from sglang_moelb.controller.split import Splitting
from sglang_moelb.ep.build_record import build, rows_by_source
from sglang_moelb.ep.controller_messages import (
    UNCHANGED,
    Answer,
    Changed,
    RawPass,
    Ready,
    Setup,
    raw,
)
from sglang_moelb.ep.metrics import Metrics
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.ep.status import Ledger
from sglang_moelb.ep.verdict_log import VerdictLog, plain
from sglang_moelb.placement import load
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.types import TracedPass
from sglang_moelb.trace.writer import TraceWriter
from sglang_moelb.types import Effects, Observation, Policy, StepRecord, Verdict


class Worker:
    """Owns the controller and all that reads its records. Raises `TraceError` at the start."""

    def __init__(self, setup: Setup, shared: SharedCounts) -> None:
        self._setup = setup
        self._shared = shared
        self._controller = Controller(setup.config, setup.topology)
        self._recalibration = _recalibration(setup)
        self._config = setup.config.resident
        self._splitting = Splitting(setup.topology)
        self._said = self._with_move(self._controller.policy)
        self._ledger = Ledger(setup.topology)
        self._trace = _trace(setup)
        self._metrics = Metrics() if setup.has_metrics else None
        if self._metrics:
            self._metrics.follow("passes", self._trace)
        self._verdicts = VerdictLog()
        self._judged: Verdict | None = None  # as said last
        self._split = _even_split(setup)
        self._mass_per_token = 1.0  # right for renormalised routers, measured at the first cut

    def ready(self) -> Ready:
        """What to say before the first pass."""
        return Ready(policy=self._said, totals=raw(self._ledger.totals()))

    def read(self, told: RawPass) -> Answer:
        """Take in one pass; its slot is not read any more afterwards."""
        counts_RLW = self._shared.counts_SRLW[told.slot]
        record = build(
            told,
            counts_RLW,
            self._shared.stats_SR8[told.slot],
            self._shared.low_SLE[told.slot],
            self._shared.copied_SLR2[told.slot],
            self._setup.topology,
            self._setup.rank,
            self._mass_per_token,
        )
        if self._split:
            rows_LE = record.rows_LEM.sum(axis=2)
            record = replace(record, rows_after_LR=self._split(rows_LE))
        self._learn_mass(record)
        self._recalibrate(record, told)
        effects = self._controller.step(Observation(record=record, now_s=told.now_s))
        self._ledger.add(record, effects)
        self._verdicts.add(effects)
        if self._metrics:
            self._metrics.add(record, effects)
        if self._trace:
            self._trace.add(
                TracedPass(
                    record=record,
                    rows_LREM=rows_by_source(counts_RLW, self._setup.topology),
                    now_s=told.now_s,
                    decision=effects.decision,
                )
            )
        decision, heat = effects.decision, self._ledger.heat()
        return Answer(
            policy=self._news(effects.policy),
            trace_state=self._trace_state(),
            decision=raw(
                {
                    "lever": decision.lever.name.lower(),
                    "reason": decision.reason,
                    "expected_gain": decision.expected_gain,
                    "expected_lost_mass_share": decision.expected_lost_mass_share,
                    "spent_mass_share": effects.estimate.spent_mass_share,
                }
                | ({"resident": self._resident_reason()} if self._recalibration else {})
            ),
            verdict=self._judgement(effects),
            heat=raw(heat) if heat else UNCHANGED,
            totals=raw(self._ledger.totals()),
            row=raw(self._ledger.newest()),
        )

    def reconfigure(self, config: Config) -> Changed:
        """Take a new configuration."""
        if self._recalibration:
            self._recalibration.reconfigure(config.resident)
            self._config = config.resident
        self._said = self._with_move(self._controller.reconfigure(config))
        if self._trace:
            self._trace.reconfigure(config)
        return Changed(policy=self._said)

    def close(self) -> None:
        """Write what is left of the trace."""
        if self._trace:
            self._trace.close()

    def _news(self, policy: Policy) -> Policy | None:
        """`policy` with the newest move, unless it was said last."""
        policy = self._with_move(policy)
        if policy == self._said:
            return None
        self._said = policy
        return policy

    def _with_move(self, policy: Policy) -> Policy:
        if not self._recalibration:
            return policy
        return replace(policy, move=self._recalibration.word, split=self._splitting.words)

    def _resident_reason(self) -> str:
        assert self._recalibration
        why = self._recalibration.reason
        return f"{why}; shares: {self._splitting.reason}" if self._config.split == "quota" else why

    def _share(self, moved: Moved | None) -> None:
        """Let the shares of copies follow the load, or end."""
        follows, splitting = self._recalibration, self._splitting
        assert follows
        if self._config.split == "even":
            splitting.end()
            return
        rows_LE = follows.rows()
        if rows_LE is not None and moved is not None:
            splitting.step(rows_LE, follows.layers, moved.split, skip=follows.moving)

    def _recalibrate(self, record: StepRecord, told: RawPass) -> None:
        """Let the placement follow the load, and the split of rows the placement."""
        follows = self._recalibration
        if not follows:
            return
        before = follows.layers, self._splitting.words
        shares_L = self._splitting.shares_of(follows.layers)
        follows.step(record.rows_LEM.sum(axis=2), told.agreed.moved, shares_L)
        self._share(told.agreed.moved)
        if (follows.layers, self._splitting.words) != before:
            self._split = SplitRows(
                follows.layers, self._setup.topology, self._splitting.shares_of(follows.layers)
            )
        if self._metrics and told.agreed.moved:
            self._metrics.add_moves(told.agreed.moved)

    def _judgement(self, effects: Effects) -> msgspec.Raw:
        """The verdict packed, unless it was said last."""
        if effects.verdict is self._judged:
            return UNCHANGED
        self._judged = effects.verdict
        return raw(plain(effects))

    def _learn_mass(self, record: StepRecord) -> None:
        num_rows = int(record.num_tokens_R.sum()) * self._setup.topology.num_layers
        if record.used_lever.cuts and num_rows:
            self._mass_per_token = record.routed_mass / num_rows

    def _trace_state(self) -> str:
        """"off", "running", or why the trace has stopped."""
        return (self._trace.stopped or "running") if self._trace else "off"


def _trace(setup: Setup) -> BackgroundWriter | None:
    if not setup.trace:
        return None
    folder = Path(setup.trace)
    return BackgroundWriter(
        TraceWriter(folder, topology=setup.topology, rank=setup.rank, config=setup.config)
    )


def _recalibration(setup: Setup) -> Recalibration | None:
    resident = setup.config.resident
    if not resident.recalibrate:
        return None
    return Recalibration(resident, load(Path(resident.placement)).layers, setup.topology)


def _even_split(setup: Setup) -> SplitRows | None:
    """What resident copies make of the rows; the ranks have found the file to fit before."""
    path = setup.config.resident.placement
    return SplitRows(load(Path(path)).layers, setup.topology) if path else None
