"""Rows of results, as the benchmarks of this folder write them: JSON lines, appended to a file."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is kept in the rows, and where they go."""
    parser.add_argument("--hardware", default="", help="kept in the rows")
    parser.add_argument("--commit", default="", help="of sglang_moelb, kept in the rows")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Add `rows` at the end of the file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def deciles(ms: list[float]) -> dict[str, float]:
    """The lowest tenth, the median and the highest tenth of at least two times."""
    tenths = statistics.quantiles(ms, n=10)
    return {"p10": tenths[0], "median": statistics.median(ms), "p90": tenths[8]}
