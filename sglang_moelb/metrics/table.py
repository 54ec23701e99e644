"""The table of metrics: names, kinds, units, labels and meaning.

`ep.metrics` makes and feeds them, `docs/metrics.md` and `dashboards/moelb.json` are written from
here, and tests hold all of them equal. Units are Prometheus's base units, shares are ratios from
0 to 1. "The last pass" is a recent one: series by layer and rank are refreshed twice a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sglang_moelb.metrics.labels import values
from sglang_moelb.types import Topology

Kind = Literal["counter", "gauge", "histogram"]
Question = Literal["alive", "does", "why", "helps", "costs", "trace"]
# What each part of the table, the docs and the board answers.
QUESTIONS: dict[Question, str] = {
    "alive": "Is it alive?",
    "does": "What does it do?",
    "why": "Why does it do that?",
    "helps": "Does it help?",
    "costs": "What does it cost?",
    "trace": "Is the trace written?",
}
LARGEST = Topology(num_layers=96, num_experts=256, num_ranks=256, topk=8)
MAX_SERIES = 1200  # of a server of those sizes
BALANCE_BUCKETS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0)
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STALLED_SHARE = 0.25  # of a pass: its own time above it is a stall


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row; `off_board` says why the board leaves it out, where it does."""

    name: str
    kind: Kind
    answers: Question
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    off_board: str = ""

    def num_series(self, topology: Topology) -> int:
        """Most series that this metric has on a server of these sizes."""
        num_labelled = math.prod(len(values(label, topology)) for label in self.labels)
        # A histogram has its buckets, the one without a limit, the sum and the count.
        return num_labelled * (len(self.buckets) + 3 if self.kind == "histogram" else 1)


METRICS: tuple[Metric, ...] = (
    Metric(name="moelb_controller_state", kind="gauge", answers="alive", unit="", labels=("state",),
           meaning="1 for the state that the controller is in, as the last pass found it"),
    Metric(name="moelb_controller_last_pass_timestamp_seconds", kind="gauge", answers="alive",
           unit="seconds", meaning="Unix time at which the controller last read a prefill pass"),
    Metric(name="moelb_stalls_total", kind="counter", answers="alive", unit="stalls",
           labels=("kind",),
           meaning="controller: it was found dead or hung; pass: own time took over a quarter of a "
           "pass; trace: a pass was not traced because the disk was behind"),
    Metric(name="moelb_mode", kind="gauge", answers="does", unit="", labels=("mode",),
           meaning="1 for the mode in force, what the user allows"),
    Metric(name="moelb_policy_lever", kind="gauge", answers="does", unit="", labels=("lever",),
           meaning="1 for the lever of the policy in force"),
    Metric(name="moelb_policy_epoch", kind="gauge", answers="does", unit="",
           meaning="epoch of the policy in force; it grows with every change",
           off_board="the lever and the mode show the same changes by name"),
    Metric(name="moelb_passes_total", kind="counter", answers="does", unit="passes",
           labels=("lever",),
           meaning="prefill passes by the lever that acted; others are not recorded"),
    Metric(name="moelb_tokens_total", kind="counter", answers="does", unit="tokens",
           labels=("lever",), meaning="tokens of all ranks in those passes"),
    Metric(name="moelb_step_seconds_total", kind="counter", answers="does", unit="seconds",
           labels=("lever",), meaning="time of those passes on EP rank 0"),
    Metric(name="moelb_gated_passes_total", kind="counter", answers="why", unit="passes",
           labels=("lever", "gate"),
           meaning="prefill passes that left the policy's lever unused, and why"),
    Metric(name="moelb_decisions_total", kind="counter", answers="why", unit="decisions",
           labels=("lever", "reason"),
           meaning="decisions in force, one a prefill pass, by class of the reason; in mode "
           "observe the lever is the one that would be chosen"),
    Metric(name="moelb_predicted_gain_ratio", kind="gauge", answers="why", unit="ratio",
           labels=("lever",), meaning="share of step time that a lever is forecast to save"),
    Metric(name="moelb_predicted_loss_ratio", kind="gauge", answers="why", unit="ratio",
           labels=("lever",), meaning="share of gate mass that a lever is forecast to lose"),
    Metric(name="moelb_confidence_ratio", kind="gauge", answers="why", unit="ratio",
           meaning="how far the controller trusts its estimate of the load"),
    Metric(name="moelb_moe_time_ratio", kind="gauge", answers="why", unit="ratio",
           meaning="share of step time that the experts of the busiest rank take; no gain can be "
           "larger"),
    Metric(name="moelb_layer_balancedness", kind="gauge", answers="helps", unit="ratio",
           labels=("layer", "when"),
           meaning="max/mean rank rows of a layer in the last pass, before and after the lever; 1 "
           "is perfect"),
    Metric(name="moelb_pass_balancedness", kind="histogram", answers="helps", unit="ratio",
           labels=("lever", "when"), buckets=BALANCE_BUCKETS,
           meaning="mean over layers of max/mean rank rows, one value a prefill pass"),
    Metric(name="moelb_busiest_rank_rows_total", kind="counter", answers="helps", unit="rows",
           labels=("lever", "when"),
           meaning="rows of each layer's busiest rank, which all others wait for, before and after "
           "the lever that acted"),
    Metric(name="moelb_rank_rows", kind="gauge", answers="helps", unit="rows",
           labels=("rank", "when"), meaning="rows of a rank in the last pass, over all layers"),
    Metric(name="moelb_saved_seconds_total", kind="counter", answers="helps", unit="seconds",
           meaning="measured gain: rows that drop, expand and replicate spared the busiest "
           "ranks, at the time of a row as fitted on EP rank 0; own time is not taken off"),
    Metric(name="moelb_own_time_seconds", kind="histogram", answers="costs", unit="seconds",
           buckets=SECONDS_BUCKETS,
           meaning="observe, exchange, plan and apply of a prefill pass: host time on a CPU, "
           "stream time on CUDA"),
    Metric(name="moelb_routed_gate_mass_total", kind="counter", answers="costs", unit="gate mass",
           meaning="sum of routing weights over all ranks in passes that drop or expand acted in"),
    Metric(name="moelb_lost_gate_mass_total", kind="counter", answers="costs", unit="gate mass",
           meaning="part of it that was dropped"),
    Metric(name="moelb_moved_gate_mass_total", kind="counter", answers="costs", unit="gate mass",
           meaning="part of it that was added or moved to other experts"),
    Metric(name="moelb_dropped_rows_total", kind="counter", answers="costs", unit="rows",
           meaning="rows dropped over all ranks",
           off_board="the share of gate mass says what the dropped rows were worth"),
    Metric(name="moelb_added_rows_total", kind="counter", answers="costs", unit="rows",
           meaning="rows added over all ranks",
           off_board="the share of gate mass says what the added rows were worth"),
    Metric(name="moelb_copied_experts_total", kind="counter", answers="costs", unit="experts",
           meaning="copies of experts that replicate made, over all ranks and layers",
           off_board="balance and rows show what the copies brought"),
    Metric(name="moelb_replica_moves_total", kind="counter", answers="costs", unit="moves",
           labels=("outcome",), meaning="moves of resident replicas while serving, and those that "
           "failed the check of the moved bytes",
           off_board="the status shows which replicas there are and what moves"),
    Metric(name="moelb_replica_moved_bytes_total", kind="counter", answers="costs", unit="bytes",
           meaning="bytes of experts that moves sent to every rank",
           off_board="the stalls show what they cost"),
    Metric(name="moelb_replica_stall_seconds_total", kind="counter", answers="costs",
           unit="seconds", meaning="time of passes that parts of moves took; resident.move_ms "
           "limits that of a pass", off_board="0 but with resident.recalibrate"),
    Metric(name="moelb_quality_spent_ratio", kind="gauge", answers="costs", unit="ratio",
           meaning="share of gate mass lost over the quality window"),
    Metric(name="moelb_quality_budget_ratio", kind="gauge", answers="costs", unit="ratio",
           meaning="most that may be lost: controller.quality_budget"),
    Metric(name="moelb_trace_state", kind="gauge", answers="trace", unit="",
           labels=("trace", "trace_state"),
           meaning="1 for the state of the trace of EP rank 0: of passes, or of tokens"),
    Metric(name="moelb_trace_bytes_total", kind="counter", answers="trace", unit="bytes",
           labels=("trace",), meaning="bytes written"),
    Metric(name="moelb_trace_passes_total", kind="counter", answers="trace", unit="passes",
           labels=("trace",), meaning="passes written"),
    Metric(name="moelb_trace_missed_passes_total", kind="counter", answers="trace", unit="passes",
           labels=("trace",), meaning="passes left out because the disk was behind"),
)  # fmt: skip


def num_series(topology: Topology) -> int:
    """Most series that a server of these sizes exports."""
    return sum(metric.num_series(topology) for metric in METRICS)
