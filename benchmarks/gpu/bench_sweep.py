"""Where the lever downgrade pays in a layer: tokens per expert by skew, measured and as modelled.

    python benchmarks/gpu/bench_sweep.py --out rows.jsonl            # one GPU, SGLang with DeepGEMM
    python benchmarks/gpu/bench_sweep.py --judge rows.jsonl          # the tables again, no GPU

The experts of one rank of four (32 of Qwen3-30B-A3B) on a hot rank's rows, skew times the mean, and
on those that are left for another rank. High: as SGLang runs them. Low: through the lever,
quantising included. Each is timed by events, medians of rounds that interleave all variants:

- device: launches are queued behind a sleep, and conversion is done under it, as under a dispatch;
- synced: the host has just waited, as it has for DeepEP's counts, so that gaps between launches
  count; conversion done before;
- exposed: as synced, with the conversion of all experts not hidden at all.

A layer takes as long as its slowest rank. The controller's cost model (controller/low_cost.py) is
asked the same, with its prior and after it has seen the measured times. Compilation included, under
90 s on an H100; sizes come in the order of their interest and stop after `--limit-s`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout

from benchmarks.gpu.one_layer import (  # noqa: E402
    LayerSizes,
    copied,
    make_layer,
    received_rows,
)
from benchmarks.gpu.sweep_verdict import Cell, report  # noqa: E402
from sglang_moelb.ep.low.flags import HostFlags  # noqa: E402
from sglang_moelb.ep.low.lanes import lanes_of  # noqa: E402
from sglang_moelb.ep.low.lever import DowngradeLever  # noqa: E402
from sglang_moelb.ep.low.staging import Staging  # noqa: E402

NUM_RANKS = 4
TOKENS = (512, 2048, 1024, 4096, 256, 8192, 128, 64)
SKEWS = (1.0, 1.5, 2.0, 3.0, 4.0)
SLEEP_CYCLES = 3_000_000  # 1.7 ms: longer than the host takes to launch all, or a conversion
TINY = LayerSizes(num_experts=2, hidden=128, inner=128, topk=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A layer, the lever on it, and how often each call is timed."""

    layer: Any
    sizes: LayerSizes
    lever: DowngradeLever
    device: torch.device
    num_calls: int

    @staticmethod
    def on(device: torch.device, num_calls: int) -> Bench:
        """One layer with one slot, and a warm lever."""
        sizes = LayerSizes() if device.type == "cuda" else TINY
        layer = make_layer(0, sizes, device)
        staging = Staging([layer], num_slots=1, resident=(), lanes=lanes_of(device))
        lever = DowngradeLever([layer], 0, staging, HostFlags(sizes.num_experts, device))
        return Bench(layer=layer, sizes=sizes, lever=lever, device=device, num_calls=num_calls)

    def prepare(self) -> None:
        """Ask for all experts at low precision."""
        every_e = torch.ones(self.sizes.num_experts, dtype=torch.int32, device=self.device)
        self.lever.prepare(0, every_e)

    def sync(self) -> None:
        """The host waits for all streams."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sleep(self) -> None:
        """Keep the device busy while the host launches."""
        if self.device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)

    def times_us(self, tokens: int, skew: float, low: bool) -> dict[str, float]:
        """Median microseconds of each variant on `tokens` times `skew` rows of every expert."""
        rows_e = [round(tokens * skew)] * self.sizes.num_experts
        num_columns = max(1, min(self.sizes.topk, round(2 * skew)))
        rows = received_rows(0, rows_e, num_columns, self.sizes, self.device)
        calls = {"high_device": partial(self._high, rows, self.sleep),
                 "high_synced": partial(self._high, rows, self.sync)}  # fmt: skip
        if low:
            calls["low_device"] = partial(self._low, rows, self.sleep)
            calls["low_synced"] = partial(self._low, rows, self.sync)
            calls["low_exposed"] = partial(self._exposed, rows)
        for call in calls.values():
            call()  # compiles
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(self.num_calls):
            for name in reversed(calls) if index % 2 else calls:
                taken[name].append(calls[name]())
        return {name: statistics.median(times) for name, times in taken.items()}

    def _high(self, rows: Any, before: Callable[[], None]) -> float:
        rows = copied(rows)
        before()
        return self.timed(lambda: self.layer.quant_method.apply(self.layer, rows))

    def _low(self, rows: Any, before: Callable[[], None]) -> float:
        rows = copied(rows)
        self.prepare()
        before()
        return self.timed(lambda: self.lever.run(self.layer, rows))

    def _exposed(self, rows: Any) -> float:
        rows = copied(rows)
        self.sync()
        return self.timed(lambda: (self.prepare(), self.lever.run(self.layer, rows)))

    def timed(self, call: Callable[[], object]) -> float:
        """Microseconds of `call`, by events."""
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            call()
            return (time.perf_counter() - start_s) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) * 1e3


def measure(bench: Bench, tokens: Sequence[int], limit_s: float) -> list[Cell]:
    """Cells, all skews of a size one after the other; stops in front of a size after `limit_s`."""
    start_s = time.perf_counter()
    cells: list[Cell] = []
    for mean in tokens:
        if time.perf_counter() - start_s > limit_s:
            print(f"{limit_s:.0f} s are over: {mean} tokens an expert and what follows left out")
            break
        for skew in SKEWS:
            other = (NUM_RANKS - skew) / (NUM_RANKS - 1)
            hot_us = bench.times_us(mean, skew, low=True)
            other_us = bench.times_us(mean, other, low=False) if other * mean >= 1 else {}
            cells.append(
                Cell(tokens_per_expert=mean, skew=skew, num_ranks=NUM_RANKS,
                     num_experts=bench.sizes.num_experts, hot_us=hot_us, other_us=other_us)
            )  # fmt: skip
        print(f"{time.perf_counter() - start_s:.0f} s: {mean} tokens an expert", flush=True)
    return cells


def conditions(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"op": "sweep", "device": name, "torch": torch.__version__,
            "num_calls": args.num_calls, "commit": args.commit}  # fmt: skip


def main() -> None:
    """Measure and judge, or judge what was measured."""
    parser = argparse.ArgumentParser(description="Sweep tokens per expert and skew.")
    parser.add_argument("--out", type=Path, help="JSON lines file to write")
    parser.add_argument("--judge", type=Path, help="JSON lines file to read instead of measuring")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--num-calls", type=int, default=11)
    parser.add_argument("--commit", default="", help="of this checkout, for the rows")
    parser.add_argument("--limit-s", type=float, default=75.0)
    args = parser.parse_args()
    if args.judge:
        print(report([Cell.of(json.loads(line)) for line in args.judge.open()]))
        return
    device = torch.device(args.device)
    cells = measure(Bench.on(device, args.num_calls), args.tokens, args.limit_s)
    told = conditions(device, args)
    if args.out:
        args.out.write_text("".join(json.dumps(told | asdict(cell)) + "\n" for cell in cells))
    print(report(cells))


if __name__ == "__main__":
    main()
