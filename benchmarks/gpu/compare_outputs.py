"""What servers answered, beside what the first of them did."""

from __future__ import annotations

import math
import statistics
from typing import Any


def log_probabilities(answers: list[Any]) -> list[tuple[float, int]]:
    """(log-probability, token) of every token out."""
    return [
        (entry[0], entry[1])
        for answer in answers
        for entry in answer["meta_info"]["output_token_logprobs"]
    ]


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
