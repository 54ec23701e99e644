"""Feeds the Prometheus metrics of the leader, beside SGLang's own; `metrics.table` says what of.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING, Any

from sglang_moelb.config import Config
from sglang_moelb.controller.moves import Moved
from sglang_moelb.ep.build_record import routed_rank_rows
from sglang_moelb.ep.status import balancedness
from sglang_moelb.metrics.labels import VALUES, decision_class, gate_class
from sglang_moelb.metrics.table import METRICS, STALLED_SHARE, Metric
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.types import TraceStats
from sglang_moelb.types import Effects, IntArray, LoadEstimate, StepRecord

if TYPE_CHECKING:
    from sglang_moelb.ep.controller_link import ControllerLink, State

REFRESH_S = 0.5  # a series a layer and rank costs too much to be written with every pass


class Metrics:
    """The metrics of one process, fed by whoever steps the controller.

    All series whose labels are known are there from the start, at 0, so that a rate sees the first
    event.
    """

    def __init__(self) -> None:
        self._made = {metric.name: _make(metric) for metric in METRICS}
        self._series: dict[tuple[str, ...], Any] = {}
        for metric in METRICS:
            if all(label in VALUES for label in metric.labels):
                for chosen in product(*(VALUES[label] for label in metric.labels)):
                    self._of(metric.name, *chosen)
        self._traced: dict[str, TraceStats] = {}
        self._moved = Moved()
        self._refreshed_s = -REFRESH_S

    @classmethod
    def if_enabled(cls) -> Metrics | None:
        """The metrics if SGLang serves any (`--enable-metrics`), else None."""
        from sglang.srt.runtime_context import get_observability

        return cls() if get_observability().enable_metrics else None

    def watch(self, controller: ControllerLink, config: Config) -> None:
        """Follow the state of `controller` and its configuration, which is `config` to begin with.

        For the serving thread's process: a controller that hangs cannot tell.
        """
        controller.on_state = self._note_state
        controller.on_config = self._note_config
        self._choose("moelb_controller_state", "running")
        self._note_config(config)

    def follow(self, trace: str, writer: BackgroundWriter | None) -> None:
        """Follow the trace `trace`, of passes or of tokens, from what writes it; None: it is off.

        For the process in which `writer` is; its thread publishes what it has written.
        """
        self._choose("moelb_trace_state", "off" if writer is None else "running", trace)
        if writer:
            writer.on_written = lambda: self._note_trace(trace, writer.stats)
            writer.on_written()

    def add(self, record: StepRecord, effects: Effects) -> None:
        """Count one prefill pass; others are left out."""
        if record.phase != "prefill":
            return
        self._of("moelb_controller_last_pass_timestamp_seconds").set(time.time())
        self._add_does(record, effects)
        self._add_why(effects.estimate, record, effects)
        self._add_costs(record, effects.estimate)
        before_LR = routed_rank_rows(record.rows_LEM, record.rows_after_LR.shape[1])
        self._add_balance(record, effects.estimate, before_LR)

    def add_moves(self, moved: Moved) -> None:
        """Count what has moved of the resident replicas since the last call."""
        before, self._moved = self._moved, moved
        for outcome, num in (
            ("done", moved.num_done - before.num_done),
            ("failed", moved.num_failed - before.num_failed),
        ):
            self._of("moelb_replica_moves_total", outcome).inc(num)
        self._of("moelb_replica_moved_bytes_total").inc(moved.num_bytes - before.num_bytes)
        stall_us = moved.stall_us - before.stall_us
        self._of("moelb_replica_stall_seconds_total").inc(stall_us / 1e6)

    def _add_does(self, record: StepRecord, effects: Effects) -> None:
        lever = record.used_lever.name.lower()
        self._of("moelb_passes_total", lever).inc()
        self._of("moelb_tokens_total", lever).inc(int(record.num_tokens_R.sum()))
        self._of("moelb_step_seconds_total", lever).inc(record.step_ms / 1e3)
        self._choose("moelb_policy_lever", effects.policy.lever.name.lower())
        self._of("moelb_policy_epoch").set(effects.policy.epoch)

    def _add_why(self, estimate: LoadEstimate, record: StepRecord, effects: Effects) -> None:
        if record.gate_reason:
            policy_lever = record.policy.lever.name.lower()
            gate = gate_class(record.gate_reason)
            self._of("moelb_gated_passes_total", policy_lever, gate).inc()
        decision = effects.decision
        decided = decision_class(decision.lever.name.lower(), decision.reason)
        self._of("moelb_decisions_total", *decided).inc()
        for forecast in estimate.forecasts:
            lever = forecast.lever.name.lower()
            self._of("moelb_predicted_gain_ratio", lever).set(forecast.gain)
            self._of("moelb_predicted_loss_ratio", lever).set(forecast.lost_mass_share)
        self._of("moelb_confidence_ratio").set(estimate.confidence)
        self._of("moelb_moe_time_ratio").set(estimate.moe_share)

    def _add_costs(self, record: StepRecord, estimate: LoadEstimate) -> None:
        self._of("moelb_own_time_seconds").observe(record.balance_ms / 1e3)
        if record.balance_ms > STALLED_SHARE * record.step_ms > 0:
            self._of("moelb_stalls_total", "pass").inc()
        self._of("moelb_quality_spent_ratio").set(estimate.spent_mass_share)
        if record.num_copies_LR is not None:
            self._of("moelb_copied_experts_total").inc(int(record.num_copies_LR.sum()))
        if record.used_lever.cuts:
            self._of("moelb_routed_gate_mass_total").inc(record.routed_mass)
            self._of("moelb_lost_gate_mass_total").inc(record.lost_mass)
            self._of("moelb_moved_gate_mass_total").inc(record.moved_mass)
            self._of("moelb_dropped_rows_total").inc(record.num_dropped_rows)
            self._of("moelb_added_rows_total").inc(record.num_added_rows)

    def _add_balance(
        self, record: StepRecord, estimate: LoadEstimate, before_LR: IntArray
    ) -> None:
        lever = record.used_lever.name.lower()
        busiest_rows: dict[str, int] = {}
        now_s = time.monotonic()
        refresh = now_s - self._refreshed_s >= REFRESH_S
        for when, rows_LR in (("before", before_LR), ("after", record.rows_after_LR)):
            balance_L = balancedness(rows_LR)
            mean_balance = sum(balance_L) / len(balance_L)
            self._of("moelb_pass_balancedness", lever, when).observe(mean_balance)
            busiest_rows[when] = int(rows_LR.max(axis=1).sum())
            self._of("moelb_busiest_rank_rows_total", lever, when).inc(busiest_rows[when])
            if refresh:
                self._refreshed_s = now_s
                for layer, balance in enumerate(balance_L):
                    self._of("moelb_layer_balancedness", str(layer), when).set(balance)
                for rank, rows in enumerate(rows_LR.sum(axis=0).tolist()):
                    self._of("moelb_rank_rows", str(rank), when).set(rows)
        spared = max(busiest_rows["before"] - busiest_rows["after"], 0)
        self._of("moelb_saved_seconds_total").inc(spared * estimate.ms_per_row / 1e3)

    def _note_state(self, state: State) -> None:
        self._choose("moelb_controller_state", state)
        if state != "running":
            self._of("moelb_stalls_total", "controller").inc()
            self._choose("moelb_policy_lever", "none")

    def _note_config(self, config: Config) -> None:
        self._choose("moelb_mode", config.mode)
        self._of("moelb_quality_budget_ratio").set(config.controller.quality_budget)

    def _note_trace(self, trace: str, stats: TraceStats) -> None:
        before = self._traced.get(trace, TraceStats(state="off"))
        self._traced[trace] = stats
        num_missed = stats.num_missed - before.num_missed
        self._choose("moelb_trace_state", stats.state, trace)
        self._of("moelb_trace_bytes_total", trace).inc(stats.num_bytes - before.num_bytes)
        self._of("moelb_trace_passes_total", trace).inc(stats.num_passes - before.num_passes)
        self._of("moelb_trace_missed_passes_total", trace).inc(num_missed)
        self._of("moelb_stalls_total", "trace").inc(num_missed)

    def _choose(self, name: str, chosen: str, *labels: str) -> None:
        """Set the series of the last label's value `chosen` to 1 and those of its others to 0."""
        label = next(metric.labels[-1] for metric in METRICS if metric.name == name)
        for value in VALUES[label]:
            self._of(name, *labels, value).set(value == chosen)

    def _of(self, name: str, *labels: str) -> Any:
        """One series; looked up in the client's own table only the first time."""
        found = self._series.get((name, *labels))
        if found is None:
            made = self._made[name]
            found = self._series[(name, *labels)] = made.labels(*labels) if labels else made
        return found


def _make(metric: Metric) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    if metric.kind == "counter":
        return Counter(metric.name, metric.meaning, metric.labels)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.meaning, metric.labels, buckets=metric.buckets)
    return Gauge(metric.name, metric.meaning, metric.labels, multiprocess_mode="mostrecent")
