"""The summary on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_moelb.ab.result import Agreement, ArmResult, PairedAccuracy, Passes, Result
from sglang_moelb.ab.wording import (
    DASH,
    MEASURES,
    accuracy_of,
    change_of,
    counted_names,
    difference_of,
    distance_of,
    equal_of,
    paired_of,
    percent,
    points_of,
    range_of,
    share_of,
    value_of,
)

SHOWN = (
    "output_tok_s",
    "prompt_tok_s",
    "requests_s",
    "ttft_ms p50",
    "ttft_ms p95",
    "latency_ms p50",
)
PAIRED: tuple[tuple[str, Callable[[PairedAccuracy], str]], ...] = (
    ("  difference, points", lambda p: points_of(p.difference)),
    ("  requests lost, won", lambda p: f"{p.num_lost}, {p.num_won} of {p.num_requests}"),
    ("  exact McNemar p", lambda p: f"{p.p_value:.3g}"),
    ("  difference that would show, points", lambda p: f"{p.smallest_difference * 100:.2f}"),
)


def summary(result: Result) -> RenderableType:
    """The tables of the comparison, and what failed."""
    parts: list[RenderableType] = [_serving(result), _agreement(result)]
    if any(arm.accuracy for arm in result.arms):
        parts.append(_quality(result))
    if any(arm.passes for arm in result.arms):
        parts.append(_balancing(result))
    parts += [Text(f"{arm.name}: {arm.failure}", style="red") for arm in result.arms if arm.failure]
    for arm in result.arms:
        parts += [
            Text(f"{arm.name}: {count} requests failed: {reason}", style="red")
            for reason, count in arm.failures.items()
        ]
    return Group(*parts)


def _serving(result: Result) -> Table:
    table = _table(result, "Serving: median of the rounds (smallest…largest), ≈ within the spread")
    table.add_row("requests, failed", *(_counts(arm) for arm in result.arms))
    for measure, label, _ in MEASURES:
        if measure in SHOWN:
            table.add_row(label, *(_cell(result, arm.name, measure) for arm in result.arms))
    return table


def _cell(result: Result, arm: str, measure: str) -> str:
    text = range_of(value_of(result, arm, "all", measure))
    change = change_of(difference_of(result, arm, "all", measure))
    return f"{text}  {change}" if change else text


def _counts(arm: ArmResult) -> str:
    row = next((row for row in arm.served if row.kind == "all"), None)
    return f"{row.num_requests}, {row.num_failed}" if row else DASH


def _agreement(result: Result) -> Table:
    table = _table(result, f"Answers, greedy, against {result.arms[0].name}")
    rows = {kind: [_find(arm.agreement, kind) for arm in result.arms] for kind in ("image", "text")}
    for kind, found in rows.items():
        if not any(found):
            continue
        table.add_row(f"{kind}: whole answers equal", *map(equal_of, found))
        table.add_row(
            f"{kind}: tokens up to the first difference",
            *(percent(row.token_share) if row else DASH for row in found),
        )
        table.add_row(
            f"{kind}: |Δ log-prob| mean / max, nats",
            *(distance_of(row.distance_all) if row else DASH for row in found),
        )
    return table


def _quality(result: Result) -> Table:
    table = _table(result, "Right answers, 95 % intervals; ± points against the first arm")
    names = [arm.name for arm in result.arms]
    pairs = [paired_of(result, arm, "all") for arm in names]
    for name in counted_names(result):
        table.add_row(name, *(_accuracy(result, arm, name) for arm in names))
        if name == "all":
            for label, show in PAIRED:
                table.add_row(label, *(show(pair) if pair else DASH for pair in pairs))
            table.add_section()
    return table


def _accuracy(result: Result, arm: str, name: str) -> str:
    row, pair = accuracy_of(result, arm, name), paired_of(result, arm, name)
    if row is None:
        return DASH
    change = f"  {pair.difference.value * 100:+.1f}" if pair else ""
    return f"{share_of(row.accuracy)}{change}"


def _balancing(result: Result) -> Table:
    table = _table(result, "Balancing: prefill passes, busiest rank over mean rank, 1.0 is perfect")
    for label, show in (
        ("mode", lambda p: p.mode),
        ("balancedness before → after", lambda p: _arrow(p.balance_before, p.balance_after)),
        ("  where a lever acted", _acted),
        (
            "busiest rank, all layers / mean before",
            lambda p: _arrow(p.busiest_before, p.busiest_after),
        ),
        ("passes by lever", _levers),
        ("routed weight dropped", lambda p: percent(p.lost_share)),
        ("routed weight moved", lambda p: percent(p.moved_share)),
        ("our time / time of passes", lambda p: percent(p.overhead_share)),
    ):
        table.add_row(label, *(show(arm.passes) if arm.passes else DASH for arm in result.arms))
    return table


def _arrow(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _acted(passes: Passes) -> str:
    if passes.balance_before_acted is None or passes.balance_after_acted is None:
        return DASH
    return _arrow(passes.balance_before_acted, passes.balance_after_acted)


def _levers(passes: Passes) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in passes.num_by_lever.items()) or DASH


def _find(rows: list[Agreement], kind: str) -> Agreement | None:
    return next((row for row in rows if row.kind == kind), None)


def _table(result: Result, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for arm in result.arms:
        table.add_column(arm.name, justify="right")
    return table
