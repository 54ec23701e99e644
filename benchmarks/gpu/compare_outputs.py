"""What servers answered, beside what the first of them did."""

from __future__ import annotations

import math
import statistics
from typing import Any

Answer = list[tuple[float, int]]  # (log-probability, token) of every token out of a request


def log_probabilities(answers: list[Any]) -> Answer:
    """(log-probability, token) of every token out."""
    return [
        (entry[0], entry[1])
        for answer in answers
        for entry in answer["meta_info"]["output_token_logprobs"]
    ]


def compared(first: list[Answer], other: list[Answer]) -> dict[str, Any]:
    """How far answers are from the first's, request by request.

    Log-probabilities are compared up to a request's first token that differs: from there on two
    texts go on.
    """
    num_same, num_tokens = 0, 0
    apart: list[float] = []
    for one, two in zip(first, other, strict=True):
        equal = [a[1] == b[1] for a, b in zip(one, two, strict=True)]
        num_same += all(equal)
        num_tokens += sum(equal)
        agreed = equal.index(False) if False in equal else len(equal)
        apart += [abs(a[0] - b[0]) for a, b in zip(one[:agreed], two[:agreed], strict=True)]
    return {
        "requests": len(first),
        "requests_equal": num_same,
        "tokens": sum(map(len, first)),
        "tokens_equal": num_tokens,
        "bit_equal": first == other,
        "apart_max": max(apart, default=0.0),
        "apart_mean": statistics.mean(apart or [0.0]),
        "finite": all(math.isfinite(value) for answer in other for value, _ in answer),
    }


def print_outputs(said: dict[str, dict[str, Any]]) -> None:
    """A line for each, against the first. Ends the process at a log-probability not finite."""
    first = next(iter(said.values()))
    for name, one in said.items():
        for kind in ("single", "batch"):
            if not all(math.isfinite(log_probability) for log_probability, _ in one[kind]):
                raise SystemExit(f"{name}: a log-probability is not finite")
            pairs = list(zip(first[kind], one[kind], strict=True))
            apart = [abs(a[0] - b[0]) for a, b in pairs]
            same = sum(a[1] == b[1] for a, b in pairs)
            bits = "bit-equal" if one[kind] == first[kind] else f"at most {max(apart):.5f} apart"
            print(f"{name:28} {kind:6} {same} of {len(pairs)} tokens equal, log-probabilities "
                  f"{bits}, mean {statistics.mean(apart):.6f}")  # fmt: skip
        shown = ("lever", "low_rows_R", "num_copies_R", "balance_after_L")
        acted = {key: one["pass"].get(key) for key in shown}
        print(f"{name:28} last pass: {acted}" if one["pass"] else f"{name:28} no status")
