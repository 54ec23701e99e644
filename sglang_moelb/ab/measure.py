"""Throughput and latency of an arm from its outcomes, per round and over rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sglang_moelb.ab.result import Difference, Latency, Served, Spread
from sglang_moelb.ab.types import ArmRun, Outcome

KINDS = ("all", "image", "text")


def served(run: ArmRun) -> list[Served]:
    """One row for all requests, one for those with images, one for text, if there are any."""
    walls_s = {r.round: r.wall_s for session in run.sessions for r in session.rounds}
    rows = (_served(kind, of_kind(run.outcomes, kind), walls_s) for kind in KINDS)
    return [row for row in rows if row.num_requests]


def of_kind(outcomes: Iterable[Outcome], kind: str) -> list[Outcome]:
    """The outcomes of `kind`, which may be `all`."""
    return [outcome for outcome in outcomes if kind in ("all", outcome.kind)]


def failures(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Reason to number of failed requests, the most frequent first."""
    return dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common())


def spread(values: Sequence[float]) -> Spread | None:
    """Median, smallest and largest of the rounds; None without any."""
    if not values:
        return None
    return Spread(
        value=float(np.median(values)),
        low=float(min(values)),
        high=float(max(values)),
        rounds=[float(value) for value in values],
    )


def differences(first: Sequence[Served], other: Sequence[Served], arm: str) -> list[Difference]:
    """What `arm` does differently from the first arm, for each measure that both have."""
    mine = _flat(other)
    rows = []
    for measure, base in _flat(first).items():
        new = mine.get(measure)
        if new is None or base.value == 0:
            continue
        rows.append(
            Difference(
                arm=arm,
                measure=measure,
                change=new.value / base.value - 1,
                within_spread=new.low <= base.high and base.low <= new.high,
            )
        )
    return rows


def _served(kind: str, outcomes: Sequence[Outcome], walls_s: dict[int, float]) -> Served:
    good = [outcome for outcome in outcomes if not outcome.error]
    by_round = {round_: [o for o in good if o.round == round_] for round_ in walls_s}

    def rate(amount: Callable[[Outcome], int]) -> Spread | None:
        return spread([sum(map(amount, by_round[r])) / walls_s[r] for r in walls_s])

    def latency(measure: Callable[[Outcome], float], least_tokens: int = 0) -> Latency | None:
        return _latency(
            [
                [measure(o) for o in done if o.num_output_tokens >= least_tokens]
                for done in by_round.values()
            ]
        )

    return Served(
        kind=kind,
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(good),
        num_prompt_tokens=sum(o.num_prompt_tokens for o in good),
        num_output_tokens=sum(o.num_output_tokens for o in good),
        prompt_tok_s=rate(lambda o: o.num_prompt_tokens),
        output_tok_s=rate(lambda o: o.num_output_tokens),
        requests_s=rate(lambda _: 1),
        ttft_ms=latency(lambda o: o.ttft_ms),
        tpot_ms=latency(lambda o: (o.latency_ms - o.ttft_ms) / (o.num_output_tokens - 1), 2),
        latency_ms=latency(lambda o: o.latency_ms),
    )


def _latency(values_ms_by_round: Sequence[Sequence[float]]) -> Latency | None:
    rounds = [values for values in values_ms_by_round if values]
    p50, p95, p99 = (
        spread([float(np.percentile(values, q)) for values in rounds]) for q in (50, 95, 99)
    )
    if p50 is None or p95 is None or p99 is None:
        return None
    return Latency(p50=p50, p95=p95, p99=p99)


def _flat(rows: Sequence[Served]) -> dict[str, Spread]:
    flat: dict[str, Spread | None] = {}
    for row in rows:
        flat[f"{row.kind} prompt_tok_s"] = row.prompt_tok_s
        flat[f"{row.kind} output_tok_s"] = row.output_tok_s
        flat[f"{row.kind} requests_s"] = row.requests_s
        for name in ("ttft_ms", "tpot_ms", "latency_ms"):
            latency: Latency | None = getattr(row, name)
            if latency is not None:
                flat |= {
                    f"{row.kind} {name} {q}": getattr(latency, q) for q in ("p50", "p95", "p99")
                }
    return {name: value for name, value in flat.items() if value is not None}
