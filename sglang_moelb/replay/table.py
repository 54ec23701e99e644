"""A replay's result as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_moelb.replay.result import ReplayResult


def summary(result: ReplayResult) -> RenderableType:
    """One row an arm, and below it what the figures rest on."""
    table = Table(
        title=_title(result),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    for name in ("mean", "p95", "worst", "peak", "lost", "low", "step ms", "saves"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in result.arms:
        table.add_row(
            arm.name,
            f"{arm.balance_mean:.2f}",
            f"{arm.balance_p95:.2f}",
            f"{arm.balance_worst_layer:.2f} L{arm.worst_layer}",
            f"{arm.peak_mean:.2f}",
            "exact" if arm.exact else _percent(arm.lost_row_share),
            _percent(arm.low_precision_share) if arm.low_precision_share else "",
            f"{arm.step_ms:.1f}",
            _percent(arm.saved_share),
        )
    return Group(table, *(Text(line) for line in notes(result)))


def notes(result: ReplayResult) -> list[str]:
    """What the figures mean and rest on, in sentences."""
    lines = [
        "mean, p95, worst (layer): balance, max/mean rows of the ranks; 1.00 is perfect. peak: "
        "rows of the busiest rank over the mean rank's before any rule. lost: routed rows that "
        "nobody computes. low: ranks at low precision.",
        "step: predicted by the cost model, in which peers' rules plan and copy weights for free.",
    ]
    error = result.model_error
    if error is not None:
        lines.append(
            f"cost model against {error.num_passes} measured passes, median error: step "
            f"{100 * error.step_median:+.1f} %, MoE layers {100 * error.layers_median:+.1f} % "
            f"(95th percentile of its size {100 * error.layers_p95_absolute:.1f} %)."
        )
    if result.num_decisions:
        lines.append(
            f"decisions: {result.num_same_decisions} of {result.num_decisions} as in the run."
        )
    if result.first_difference:
        lines.append(f"first other decision: {result.first_difference}")
    if result.num_missed_passes:
        lines.append(f"{result.num_missed_passes} passes are missing from the trace.")
    lines.append(f"verdict (docs/operations.md): {result.verdict}")
    return lines


def _title(result: ReplayResult) -> str:
    at = f"EP {result.num_ranks}"
    if result.num_ranks != result.traced_ranks:
        at += f" (traced at EP {result.traced_ranks})"
    return (
        f"{result.num_prefill_passes} prefill passes, {result.num_layers} layers, "
        f"{result.num_experts} experts, {at}"
    )


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"
