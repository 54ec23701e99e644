"""Prometheus metrics of the leader, beside SGLang's own; names, units and meaning in one table.

Labels are bounded: `lever` has one value a lever, `layer` one a MoE layer; ranks are no label.

Shape letters: L MoE layers, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sglang_moelb.ep.build_record import routed_rank_rows
from sglang_moelb.ep.status import balancedness
from sglang_moelb.types import Effects, Lever, StepRecord

if TYPE_CHECKING:
    from sglang_moelb.ep.controller_link import ControllerLink


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...] = ()
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(name="moelb_passes_total", kind="counter", labels=("phase", "lever"),
           meaning="prefill passes by the lever that acted; others are not recorded"),
    Metric(name="moelb_balancedness_before", kind="gauge", labels=("layer",),
           meaning="max/mean rank rows of the last prefill pass before any lever, 1 is perfect"),
    Metric(name="moelb_balancedness_after", kind="gauge", labels=("layer",),
           meaning="max/mean rank rows of the last prefill pass after the lever"),
    Metric(name="moelb_routed_gate_mass_total", kind="counter",
           meaning="sum of routing weights over all ranks in passes with a lever"),
    Metric(name="moelb_lost_gate_mass_total", kind="counter",
           meaning="part of it that was dropped"),
    Metric(name="moelb_moved_gate_mass_total", kind="counter",
           meaning="part of it that was added or moved to other experts"),
    Metric(name="moelb_dropped_rows_total", kind="counter",
           meaning="rows dropped over all ranks"),
    Metric(name="moelb_balance_seconds_total", kind="counter",
           meaning="host time (CPU) or stream time (CUDA) of observe, exchange, plan and apply"),
    Metric(name="moelb_policy_epoch", kind="gauge", meaning="epoch of the policy in force"),
    Metric(name="moelb_spent_mass_share", kind="gauge",
           meaning="share of gate mass lost over the quality window"),
    Metric(name="moelb_controller_up", kind="gauge",
           meaning="1 while the controller process answers, 0 when it is dead or hung"),
)  # fmt: skip


class Metrics:
    """The metrics of one process, fed by the controller process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self._made: dict[str, Any] = {}
        for metric in METRICS:
            if metric.kind == "counter":
                made: Any = Counter(metric.name, metric.meaning, metric.labels)
            else:
                made = Gauge(
                    metric.name, metric.meaning, metric.labels, multiprocess_mode="mostrecent"
                )
            self._made[metric.name] = made

    @classmethod
    def if_enabled(cls) -> Metrics | None:
        """The metrics if SGLang serves any (`--enable-metrics`), else None."""
        from sglang.srt.runtime_context import get_observability

        return cls() if get_observability().enable_metrics else None

    def watch(self, controller: ControllerLink) -> None:
        """Let the serving thread publish whether `controller` answers."""
        gauge = self._made["moelb_controller_up"]
        gauge.set(1)
        controller.on_state = lambda state: gauge.set(state == "running")

    def add(self, record: StepRecord, effects: Effects) -> None:
        """Count one pass."""
        made = self._made
        lever = record.used_lever
        made["moelb_passes_total"].labels(record.phase, lever.name.lower()).inc()
        made["moelb_balance_seconds_total"].inc(record.balance_ms / 1e3)
        made["moelb_policy_epoch"].set(effects.policy.epoch)
        made["moelb_spent_mass_share"].set(effects.estimate.spent_mass_share)
        if lever is not Lever.NONE:
            made["moelb_routed_gate_mass_total"].inc(record.routed_mass)
            made["moelb_lost_gate_mass_total"].inc(record.lost_mass)
            made["moelb_moved_gate_mass_total"].inc(record.moved_mass)
            made["moelb_dropped_rows_total"].inc(record.num_dropped_rows)
        if record.phase == "prefill":
            num_ranks = record.rows_after_LR.shape[1]
            before_LR = routed_rank_rows(record.rows_LEM, num_ranks)
            self._set_layers("moelb_balancedness_before", balancedness(before_LR))
            self._set_layers("moelb_balancedness_after", balancedness(record.rows_after_LR))

    def _set_layers(self, name: str, values: list[float]) -> None:
        for layer, value in enumerate(values):
            self._made[name].labels(str(layer)).set(value)
