"""Runner of the kernel benchmarks: times cases, prints a table, writes JSON rows.

Each bench_<op>.py makes the cases of its op, and is run as `python benchmarks/bench_<op>.py`. With
a CUDA device the Triton kernels are timed, without one the references on the host.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sglang_moelb.kernels.testing import Timing, bench

FLOOR_BYTES_PER_US = 3.0e6  # 3.0 TB/s, what a copy reaches on an H100


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCase:
    """One timed call; `num_bytes` is what it must at least read and write."""

    op: str
    label: str
    call: Callable[[], object]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One line of the results; times in microseconds, `floor_us` at 3.0 TB/s."""

    op: str
    label: str
    device: str
    torch: str
    triton: str
    num_bytes: int
    floor_us: float
    timing: Timing


def run_cases(cases: Iterable[BenchCase], num_calls: int) -> list[BenchRow]:
    """Time the cases one after another and print a line for each."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, triton {_version('triton')}; microseconds")
    print(f"{'op':17}{'case':43}{'median':>8}{'p10':>8}{'p90':>8}{'host':>8}{'floor':>8}")
    rows = []
    for case in cases:
        timing = bench(case.call, num_calls=num_calls)
        row = BenchRow(
            op=case.op,
            label=case.label,
            device=device,
            torch=torch.__version__,
            triton=_version("triton"),
            num_bytes=case.num_bytes,
            floor_us=case.num_bytes / FLOOR_BYTES_PER_US,
            timing=timing,
        )
        times = (timing.median_us, timing.p10_us, timing.p90_us, timing.host_us, row.floor_us)
        print(f"{row.op:17}{row.label:43}" + "".join(f"{us:8.1f}" for us in times), flush=True)
        rows.append(row)
    return rows


def write_rows(rows: Iterable[BenchRow], path: Path) -> None:
    """Write the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def main(make_cases: Callable[[str], Iterable[BenchCase]]) -> None:
    """Command line of one benchmark."""
    parser = argparse.ArgumentParser(description="Time one kernel against its byte floor.")
    parser.add_argument("--out", type=Path, help="JSON lines file to write")
    parser.add_argument("--num-calls", type=int, default=100, help="timed calls a case")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = run_cases(make_cases(device), args.num_calls)
    if args.out is not None:
        write_rows(rows, args.out)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
