"""Times the fp8 kernels on a CUDA device: the conversion beside a copy of as many bytes, then all.

    python benchmarks/gpu/bench_fp8.py --out rows.jsonl

The conversion of a layer of Qwen3-30B-A3B (32 and 16 local experts) runs with few programs and
many, the larger in every form of the kernel too, in rounds of one call each, every other round in
reverse order, on a device that stays busy; a copy that reads and writes as many bytes runs in the
same rounds. Times are of CUDA events round each call. Then the cases of benchmarks/bench_<op>.py
run as they do alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a checkout, nothing installed

from bench_convert_fp8 import FEW_PROGRAMS, Layer, make_layer  # noqa: E402
from kernel_bench import run_cases, write_rows  # noqa: E402

from sglang_moelb.kernels.convert_fp8 import convert_fp8, kernel  # noqa: E402

OPS = ("plan_downgrade", "convert_fp8", "quantise_rows")
COPY = "copy"
# (warps, stages): 1 stage has a tile's loads in flight, n stages those of n - 1 tiles.
FORMS = ((4, 1), (4, 3), (8, 1), (8, 2), (8, 3), (8, 4), (16, 1), (16, 3), (16, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRow:
    """One line of the results; times in microseconds, bytes read and written."""

    op: str
    label: str
    device: str
    torch: str
    num_experts: int
    num_bytes: int
    num_calls: int
    median_us: float
    p10_us: float
    p90_us: float
    terabytes_per_s: float
    share_of_copy: float


def make_calls(
    layer: Layer, num_sms: int, forms: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The copy, the op as it is called, and forms of its kernel."""
    source = torch.empty(layer.num_bytes // 2, dtype=torch.uint8, device="cuda")
    yield COPY, partial(torch.empty_like(source).copy_, source)
    wanted_E = torch.ones(len(layer.weights[0]), dtype=torch.int32, device="cuda")
    tensors = (layer.weights, layer.out, layer.scales)
    for programs in (None, *FEW_PROGRAMS):
        call = partial(convert_fp8, *tensors, wanted_E=wanted_E, num_programs=programs)
        yield f"convert_fp8 P={programs}", call
    for warps, stages in forms:
        for programs in (*FEW_PROGRAMS, *(num_sms * times for times in (1, 2, 4, 8))):
            yield (
                f"W={warps} S={stages} P={programs}",
                partial(
                    kernel.launch,
                    *tensors,
                    wanted_E=wanted_E,
                    num_programs=programs,
                    num_warps=warps,
                    num_stages=stages,
                ),
            )


def time_in_rounds(calls: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list]:
    """Microseconds of every call in every round."""
    for call in calls.values():  # compiles
        call()
    events: dict[str, list] = {label: [] for label in calls}
    for index in range(num_rounds):
        for label in reversed(calls) if index % 2 else calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[label]()
            end.record()
            events[label].append((start, end))
    torch.cuda.synchronize()
    return {
        label: [start.elapsed_time(end) * 1e3 for start, end in pairs]
        for label, pairs in events.items()
    }


def time_conversions(
    num_experts: int, forms: Sequence[tuple[int, int]], num_rounds: int
) -> list[ConversionRow]:
    """Rows of one size, printed as a table."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    layer = make_layer(num_experts, "cuda")
    times = time_in_rounds(dict(make_calls(layer, num_sms, forms)), num_rounds)
    copy_us = statistics.median(times[COPY])
    rows = []
    for label, times_us in times.items():
        ordered = sorted(times_us)
        median_us = statistics.median(ordered)
        rows.append(
            ConversionRow(
                op="conversion",
                label=label,
                device=torch.cuda.get_device_name(),
                torch=torch.__version__,
                num_experts=num_experts,
                num_bytes=layer.num_bytes,
                num_calls=len(ordered),
                median_us=median_us,
                p10_us=ordered[len(ordered) // 10],
                p90_us=ordered[len(ordered) * 9 // 10],
                terabytes_per_s=layer.num_bytes / median_us / 1e6,
                share_of_copy=copy_us / median_us,
            )
        )
    print(f"E={num_experts}, {layer.num_bytes / 1e6:.0f} MB read and written")
    for row in rows:
        print(
            f"  {row.label:24}{row.median_us:8.1f} us ({row.p10_us:.1f} to {row.p90_us:.1f})"
            f"{row.terabytes_per_s:7.2f} TB/s{row.share_of_copy:7.1%} of the copy"
        )
    return rows


def main() -> None:
    """Time the conversions, then the other ops."""
    parser = argparse.ArgumentParser(description="Time the fp8 kernels on a CUDA device.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--num-rounds", type=int, default=20, help="rounds of the conversion")
    parser.add_argument("--num-calls", type=int, default=50, help="timed calls of the other cases")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_fp8.py needs a CUDA device, and torch sees none")
    rows = time_conversions(32, FORMS, args.num_rounds) + time_conversions(16, (), args.num_rounds)
    cases = (
        case for op in OPS for case in importlib.import_module(f"bench_{op}").make_cases("cuda")
    )
    write_rows(run_cases(cases, args.num_calls), args.out)
    with args.out.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
