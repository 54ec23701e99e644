"""Numbers and names as people read them; used by the terminal table and the report alike."""

from __future__ import annotations

from sglang_moelb.ab.result import (
    Accuracy,
    Agreement,
    Difference,
    Distance,
    Estimate,
    Latency,
    PairedAccuracy,
    Result,
    Spread,
)

DASH = "-"

# Name of a measure in `Difference`, its label with unit, whether more is better.
MEASURES = (
    ("output_tok_s", "output throughput, tok/s", True),
    ("prompt_tok_s", "prompt throughput, tok/s", True),
    ("requests_s", "requests/s", True),
    ("ttft_ms p50", "time to first token p50, ms", False),
    ("ttft_ms p95", "time to first token p95, ms", False),
    ("ttft_ms p99", "time to first token p99, ms", False),
    ("tpot_ms p50", "time per output token p50, ms", False),
    ("latency_ms p50", "end to end p50, ms", False),
    ("latency_ms p95", "end to end p95, ms", False),
    ("latency_ms p99", "end to end p99, ms", False),
)


def number(value: float) -> str:
    """Three significant digits, with a comma between thousands."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if size >= 0.01 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share as per cent; small ones keep two digits."""
    size = abs(share) * 100
    if size in (0, 100):
        return f"{share * 100:.0f} %"
    return f"{share * 100:.1f} %" if size >= 1 else f"{share * 100:.2g} %"


def range_of(spread: Spread | None) -> str:
    """The median with the smallest and the largest round."""
    if spread is None:
        return DASH
    if len(spread.rounds) == 1:
        return number(spread.value)
    return f"{number(spread.value)} ({number(spread.low)}…{number(spread.high)})"


def change_of(difference: Difference | None) -> str:
    """A signed change; `≈` where the rounds of both arms overlap, so that it may be chance."""
    if difference is None:
        return ""
    mark = "≈ " if difference.within_spread else ""
    return f"{mark}{difference.change * 100:+.1f} %"


def value_of(result: Result, arm: str, kind: str, measure: str) -> Spread | None:
    """The spread behind `measure` of `arm` for requests of `kind`; None if there is none."""
    served = next(a for a in result.arms if a.name == arm).served
    row = next((row for row in served if row.kind == kind), None)
    name, _, percentile = measure.partition(" ")
    value: Spread | Latency | None = getattr(row, name, None)
    return getattr(value, percentile) if isinstance(value, Latency) else value


def difference_of(result: Result, arm: str, kind: str, measure: str) -> Difference | None:
    """The difference of `arm` to the first arm in `measure`; None for the first arm itself."""
    wanted = f"{kind} {measure}"
    return next((d for d in result.differences if d.arm == arm and d.measure == wanted), None)


def equal_of(row: Agreement | None) -> str:
    """How many whole answers are equal."""
    return DASH if row is None else f"{percent(row.equal_share)} ({row.num_equal}/{row.num_pairs})"


def distance_of(distance: Distance | None) -> str:
    """Mean and largest difference of a log-probability."""
    if distance is None:
        return DASH
    return f"{number(distance.mean)} / {number(distance.max)}"


def accuracy_of(result: Result, arm: str, name: str) -> Accuracy | None:
    """The arm's right answers to the requests counted under `name`; None if there are none."""
    rows = next(a for a in result.arms if a.name == arm).accuracy
    return next((row for row in rows if row.name == name), None)


def paired_of(result: Result, arm: str, name: str) -> PairedAccuracy | None:
    """The same against the first arm; None for the first arm itself."""
    rows = next(a for a in result.arms if a.name == arm).paired_accuracy
    return next((row for row in rows if row.name == name), None)


def counted_names(result: Result) -> list[str]:
    """What right answers are counted under, in the order of the first arm that has each."""
    return list(dict.fromkeys(row.name for arm in result.arms for row in arm.accuracy))


def share_of(estimate: Estimate) -> str:
    """A share with its interval, in per cent. Example: 98.4 % (95.2…99.5)."""
    low, high = estimate.interval
    return f"{estimate.value * 100:.1f} % ({low * 100:.1f}…{high * 100:.1f})"


def points_of(estimate: Estimate) -> str:
    """A difference of shares with its interval, in points. Example: -0.50 (-1.90…+0.90)."""
    low, high = estimate.interval
    return f"{estimate.value * 100:+.2f} ({low * 100:+.2f}…{high * 100:+.2f})"
