"""The three forms of the lever downgrade on a hot rank whose experts differ in load.

    python benchmarks/gpu/bench_forms.py --out rows.jsonl            # one GPU, SGLang with DeepGEMM

One GPU as the hot rank of four: 32 experts of Qwen3-30B-A3B, `skew` times the mean rows, all
vision, spread over the experts evenly or as 1 / place ** `tilt`. Each form is planned by
`plan_downgrade` from the counts of all ranks, converted before and run through the lever, beside
bfloat16 for all, and beside what another rank has to do: a layer takes as long as its slowest rank.
The table says how many experts a form lowers, in brackets.
Medians of rounds that interleave all arms, *device* and *synced* as in `bench_sweep`.
`--device cpu` runs tiny shapes, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout

from benchmarks.gpu.bench_sweep import NUM_RANKS, Bench  # noqa: E402
from benchmarks.gpu.one_layer import copied, received_rows  # noqa: E402
from sglang_moelb.kernels import row_layout  # noqa: E402
from sglang_moelb.kernels.plan_downgrade import plan_downgrade  # noqa: E402
from sglang_moelb.types import Form  # noqa: E402

HOT = 0
TOKENS, SKEWS, TILTS = (512, 2048, 4096), (1.5, 2.0, 3.0), (0.0, 0.5, 1.0)


def rows_of(tokens: int, skew: float, tilt: float, num_experts: int) -> list[int]:
    """Rows of each of a rank's experts; their sum is `skew * tokens` an expert."""
    shares = [(place + 1) ** -tilt for place in range(num_experts)]
    return [round(tokens * skew * num_experts * share / sum(shares)) for share in shares]


def planned(rows_R: list[list[int]], form: Form, device: torch.device) -> torch.Tensor:
    """The experts that `form` lowers where every row is of vision."""
    rows_E = torch.tensor([n for rows_e in rows_R for n in rows_e], dtype=torch.int32)
    counts_RW = torch.zeros(
        len(rows_R), row_layout.row_width(len(rows_E), with_histogram=False), dtype=torch.int32
    )
    row_layout.counts_of(counts_RW, len(rows_E))[HOT, :, row_layout.C_VISION_ROWS] = rows_E
    return plan_downgrade(
        counts_RW.to(device), num_experts=len(rows_E), capacity_factor=1.0, vision_share=0.7,
        form=form,
    )  # fmt: skip


def measure(bench: Bench, tokens: int, skew: float, tilt: float) -> dict[str, Any]:
    """One row: microseconds of every arm, and how many experts each form lowers."""
    num_experts, device = bench.sizes.num_experts, bench.device
    hot_e = rows_of(tokens, skew, tilt, num_experts)
    other_e = rows_of(tokens, (NUM_RANKS - skew) / (NUM_RANKS - 1), 0.0, num_experts)
    columns = max(1, min(bench.sizes.topk, round(2 * skew)))
    hot, other = (
        received_rows(0, rows_e, columns, bench.sizes, device) for rows_e in (hot_e, other_e)
    )
    plans = {form: planned([hot_e] + [other_e] * (NUM_RANKS - 1), form, device) for form in Form}
    waits = {"device": bench.sleep, "synced": bench.sync}
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    for clock, wait in waits.items():
        calls["bfloat16", clock] = partial(_high, bench, hot, wait)
        for form, low_E in plans.items():
            calls[form.name.lower(), clock] = partial(_low, bench, hot, low_E, wait)
        calls["another rank", clock] = partial(_high, bench, other, wait)
    taken = _interleaved(calls, bench.num_calls)
    return {
        "tokens_per_expert": tokens, "skew": skew, "tilt": tilt, "num_ranks": NUM_RANKS,
        "num_low": {form.name.lower(): int(plan.sum()) for form, plan in plans.items()},
        "us": {clock: {arm: taken[arm, of] for arm, of in taken if of == clock} for clock in waits},
    }  # fmt: skip


def _interleaved(
    calls: dict[tuple[str, str], Callable[[], float]], num_calls: int
) -> dict[tuple[str, str], float]:
    """Medians of rounds of all calls, every second round in reverse."""
    for call in calls.values():
        call()  # compiles
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for index in range(num_calls):
        for name in reversed(calls) if index % 2 else calls:
            taken[name].append(calls[name]())
    return {name: statistics.median(times) for name, times in taken.items()}


def _high(bench: Bench, rows: Any, wait: Callable[[], None]) -> float:
    rows = copied(rows)
    wait()
    return bench.timed(lambda: bench.layer.quant_method.apply(bench.layer, rows))


def _low(bench: Bench, rows: Any, low_E: torch.Tensor, wait: Callable[[], None]) -> float:
    rows = copied(rows)
    bench.lever.prepare(0, low_E)
    wait()
    return bench.timed(lambda: bench.lever.run(bench.layer, rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds of the hot rank by arm, and the share of the layer that each form saves."""
    forms = [form.name.lower() for form in Form]
    arms = ["bfloat16", *forms, "another rank"]
    heads = ["tokens an expert", "skew", "tilt", "clock", *arms, *(f"saved, {f}" for f in forms)]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---:" for _ in heads) + " |"]
    for row in rows:
        for clock, us in row["us"].items():
            layer = {arm: max(us[arm], us["another rank"]) for arm in arms}
            cells = [f"{row[name]:g}" for name in ("tokens_per_expert", "skew", "tilt")]
            cells += [clock] + [f"{us[arm]:.0f}" for arm in arms]
            for form in forms:
                saved = 1 - layer[form] / layer["bfloat16"]
                cells.append(f"{saved:+.1%} ({row['num_low'][form]})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--num-calls", type=int, default=15)
    parser.add_argument("--commit", default="", help="of this checkout, for the rows")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    told = {"op": "forms", "device": name, "torch": torch.__version__,
            "num_calls": args.num_calls, "commit": args.commit}  # fmt: skip
    bench, rows = Bench.on(device, args.num_calls), []
    for tokens in args.tokens:
        for skew in SKEWS:
            rows += [told | measure(bench, tokens, skew, tilt) for tilt in TILTS]
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
