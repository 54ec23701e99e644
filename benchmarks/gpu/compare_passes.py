"""What `run_prefill.sh` left in a folder, as a table of the times of passes.

    python -m benchmarks.gpu.compare_passes results

A pass counts when rank 0 had a full one (16,384 or 1,024 tokens) and no other rank had less than
nine tenths of it, as far as the rows say; left out are those that warm up or learn, and where none
says so, the first four of a kind. `period` is the time from the start of a pass to the start of the
next within a burst.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

FULL = (16384, 1024)  # tokens
NUM_WARMUP = 4
FULL_SHARE = 0.9
MAX_PERIOD_MS = 1000.0
UNMEASURED = ("warm-up", "learning")  # labels


def main() -> None:
    """Print the table of every server."""
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("passes-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for kind in sorted({kind_of(row) for row in rows if row["num_tokens"] in FULL}):
            print_passes(path.stem, kind, rows)


def is_full(row: dict[str, Any]) -> bool:
    """Whether all ranks had about as many tokens as rank 0."""
    return bool(row.get("fewest_tokens", row["num_tokens"]) >= FULL_SHARE * row["num_tokens"])


def kind_of(row: dict[str, Any]) -> tuple[int, str, str, str]:
    """What passes have in common that are compared: size, imposed load, label and lever."""
    load = row["load"] if "load" in row else f"{row['skew']:g}"
    return row["num_tokens"], load, row.get("label", ""), row["lever"]


def print_passes(name: str, kind: tuple[int, str, str, str], rows: list[dict[str, Any]]) -> None:
    """Medians and quartiles of the passes of one kind of one server."""
    num_tokens, load, label, lever = kind
    if label in UNMEASURED:
        return
    pairs = [
        (row, 1e3 * (after["begun_s"] - row["begun_s"]))
        for row, after in pairwise(rows)
        if kind_of(row) == kind and is_full(row)
    ][0 if label else NUM_WARMUP :]
    if not pairs:
        return
    print(f"{name}: {len(pairs)} passes of {num_tokens} tokens, skew {load}, "
          f"{f'mode {label}, ' if label else ''}lever {lever or 'none of ours'}")  # fmt: skip
    loads = [
        imbalance(row["routed_rows_LR"])
        for row in rows
        if "routed_rows_LR" in row and kind_of(row)[1:3] == (load, label)
    ]
    if loads:
        print(f"  max/mean rank rows before a lever: mean {np.mean(loads):.3f}, worst layer "
              f"{np.max(loads):.3f} ({len(loads)} passes)")  # fmt: skip
    columns = {
        "host_ms": [row["host_ms"] for row, _ in pairs],
        "device_ms": [row["device_ms"] for row, _ in pairs],
        "period_ms": [period for _, period in pairs if period < MAX_PERIOD_MS],
    }
    for part in sorted({part for row, _ in pairs for part in row["parts_us"]}):
        columns[f"{part}, ms"] = [row["parts_us"].get(part, 0) / 1e3 for row, _ in pairs]
    for column, values in columns.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"  {column:28} median {middle:8.3f}, quartiles {low:8.3f} to {high:8.3f}")


def imbalance(rows_LR: list[list[int]]) -> list[float]:
    """max/mean over ranks of each layer."""
    return [max(rows_R) * len(rows_R) / sum(rows_R) for rows_R in rows_LR]


if __name__ == "__main__":
    main()
