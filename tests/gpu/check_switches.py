"""The lever downgrade switched on and off under load, every output against its plan, on one device.

    python tests/gpu/check_switches.py                        # one GPU, SGLang with DeepGEMM
    python tests/gpu/check_switches.py --device cpu --num-passes 200

Passes of four MoE layers, each with rows, a plan and a form drawn at random: off, the whole rank,
or some experts. The experts run as in a server, SGLang's runner and ours, conversions on their
own stream into two slots; one layer is resident. Every output must equal, bit for bit, that of its
layer, rows and plan computed alone beforehand. Memory is read every hundred passes and must not
grow. Then with conversions that come late, which must be right, and the same with the wait for them
taken out, which must be found wrong.
No server; the exit status says. About a minute on an H100.

Shape letters: E local experts, N rows, H hidden size.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout

from benchmarks.gpu.one_layer import LayerSizes, copied, make_layer, received_rows
from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.lanes import Event, HostLanes, StreamLanes
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.staging import Staging

NUM_LAYERS, NUM_SLOTS, RESIDENT = 4, 2, (2,)
SAMPLE_PASSES = 100
LATE_CYCLES = 4_000_000  # of the GPU's clock, about 2 ms, where a layer here takes less than one
SIZES = {"cuda": LayerSizes(), "cpu": LayerSizes(num_experts=4, hidden=128, inner=128, topk=2)}
# Rows of an expert, in turn; 0, 1 and the neighbours of DeepGEMM's 128 are among them.
BATCHES = {
    "cuda": ((0, 1, 127, 128, 129, 300), (64, 700, 0, 5), (512,)),
    "cpu": ((0, 1, 17, 5), (3, 40), (8,)),
}


class LateLanes(StreamLanes):
    """Streams whose side lane is later than the rows that need what it makes."""

    @contextmanager
    def aside(self, after: tuple[Event, ...]) -> Iterator[None]:
        """See `Lanes`."""
        with super().aside(after):
            torch.cuda._sleep(LATE_CYCLES)
            yield


class DeafLanes(LateLanes):
    """The same, and the main lane does not wait for it."""

    def wait(self, event: Event) -> None:
        """Does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A layer's rows, its plan, and the output that goes with them."""

    layer: int
    rows: Any
    low_E: torch.Tensor
    expected_NH: torch.Tensor


@dataclass(slots=True)
class Outcome:
    """What passes have shown: `wrong_P` is on the device, wrong values of each pass."""

    wrong_P: torch.Tensor
    num_switches: int = 0
    num_host_waits: int = 0
    num_low_layers: int = 0
    samples: list[tuple[int, int, int]] = field(default_factory=list)


def plans(num_experts: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the three forms, and no plan, say of the local experts: int32, 1 for a low one."""
    every = torch.arange(num_experts, device=device)
    return {
        "none": torch.zeros_like(every),
        "rank": torch.ones_like(every),
        "experts": every % 3 == 0,
        "fewest": every == 1,
    }


def make_cases(device: torch.device, layers: list[Any]) -> dict[str, dict[int, list[Case]]]:
    """Cases by plan and batch, one a layer; every output computed by itself, with no lever."""
    sizes = SIZES[device.type]
    cases: dict[str, dict[int, list[Case]]] = {}
    for name, low_e in plans(sizes.num_experts, device).items():
        low_E = low_e.to(torch.int32)
        cases[name] = {}
        for batch, pattern in enumerate(BATCHES[device.type]):
            rows_e = [pattern[e % len(pattern)] for e in range(sizes.num_experts)]
            num_columns = min(4, sizes.topk)
            cases[name][batch] = [
                Case(
                    layer=number,
                    rows=(rows := received_rows(batch, rows_e, num_columns, sizes, device)),
                    low_E=low_E,
                    expected_NH=expected(layer, rows, low_e != 0),
                )
                for number, layer in enumerate(layers)
            ]
    return cases


def expected(layer: Any, rows: Any, is_low_e: torch.Tensor) -> torch.Tensor:
    """What the plan asks for: high experts by SGLang, low ones in float8, and the sum of both."""
    parts = []
    is_low_NK = is_low_e[rows.topk_ids.clamp(min=0)] & (rows.topk_ids >= 0)
    for low in (False, True):
        kept_NK = is_low_NK if low else ~is_low_NK & (rows.topk_ids >= 0)
        counts = zip(rows.num_recv_tokens_per_expert, is_low_e.tolist(), strict=True)
        part = copied(rows)._replace(
            topk_ids=rows.topk_ids.where(kept_NK, -1),
            num_recv_tokens_per_expert=[n if is_low == low else 0 for n, is_low in counts],
        )
        if not any(part.num_recv_tokens_per_expert):
            continue
        if low:
            weights = fp8.allocate(layer)
            fp8.convert(layer, weights, torch.ones_like(is_low_e, dtype=torch.int32))
            parts.append(fp8.run(layer, fp8.quantised(part), weights).hidden_states)
        else:
            parts.append(layer.quant_method.apply(layer, part).hidden_states)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def check_cases(cases: dict[str, dict[int, list[Case]]]) -> None:
    """No two plans of a batch may have one answer, or a wrong plan would not be seen."""
    for batch in next(iter(cases.values())):
        outputs = [of_plan[batch][0].expected_NH for of_plan in cases.values()]
        for index, one in enumerate(outputs):
            if not one.isfinite().all() or not one.any():
                raise SystemExit(f"batch {batch}: an output of the reference is not finite, or 0")
            if any(torch.equal(one, other) for other in outputs[:index]):
                raise SystemExit(f"batch {batch}: two plans have equal outputs, nothing is checked")


def make_lever(layers: list[Any], lanes: Any, device: torch.device) -> DowngradeLever:
    """The lever as a server makes it, on rank 0."""
    staging = Staging(layers, num_slots=NUM_SLOTS, resident=RESIDENT, lanes=lanes)
    return DowngradeLever(layers, 0, staging, HostFlags(len(layers[0].w13_weight), device))


def run_passes(
    lever: DowngradeLever,
    layers: list[Any],
    cases: dict[str, dict[int, list[Case]]],
    num_passes: int,
    seed: int = 0,
) -> Outcome:
    """Passes with plans at random; the host waits only where DeepEP's dispatch would make it."""
    rng = random.Random(seed)
    device = layers[0].w13_weight.device
    outcome = Outcome(wrong_P=torch.zeros(num_passes, dtype=torch.int64, device=device))
    before = ""
    for index in range(num_passes):
        plan, batch = rng.choice(list(cases)), rng.randrange(len(BATCHES[device.type]))
        outcome.num_switches += plan != before
        before = plan
        for case in cases[plan][batch]:
            if plan != "none":
                lever.prepare(case.layer, case.low_E)
            rows = dispatched(case.rows)
            layer = layers[case.layer]
            out = lever.run(layer, rows)
            if out is None:
                out = layer.quant_method.apply(layer, rows)
            outcome.wrong_P[index] += (out.hidden_states != case.expected_NH).sum()
        lever.forget()
        if index % SAMPLE_PASSES == SAMPLE_PASSES - 1:
            outcome.samples.append(memory(device))
    told = lever.told()
    outcome.num_host_waits, outcome.num_low_layers = told["num_host_waits"], told["num_low_layers"]
    return outcome


def dispatched(rows: Any) -> Any:
    """A copy of the rows, for which the host waits as it does for the counts of DeepEP."""
    rows = copied(rows)
    if rows.hidden_states.is_cuda:
        torch.cuda.current_stream().synchronize()
    return rows


def memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes allocated, bytes reserved, and resident bytes of the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if device.type != "cuda":
        return 0, 0, pages * 4096
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats(device)
    allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    return allocated, reserved, pages * 4096


def problems(outcome: Outcome) -> Iterator[str]:
    """One text for each law that does not hold."""
    wrong = outcome.wrong_P.nonzero().flatten().tolist()
    if wrong:
        yield f"{len(wrong)} passes with wrong values, the first is pass {wrong[0]}"
    if outcome.num_host_waits:
        yield f"the host waited {outcome.num_host_waits} times for a plan"
    if not outcome.num_low_layers:
        yield "no layer ran at low precision"
    half = len(outcome.samples) // 2
    # What is reserved depends a little on the order of the passes, as blocks are split.
    for name, column, tolerance in (("allocated", 0, 0.0), ("reserved", 1, 0.02), ("host", 2, 0.1)):
        values = [sample[column] for sample in outcome.samples]
        if half and max(values[half:]) > max(values[:half]) * (1 + tolerance):
            yield f"{name} memory grew from {max(values[:half])} to {max(values[half:])} bytes"


def is_wrong(layers: list[Any], cases: dict[str, dict[int, list[Case]]], lanes: Any) -> bool:
    """Whether passes with conversions on `lanes` have a wrong value."""
    lever = make_lever(layers, lanes, layers[0].w13_weight.device)
    low = {name: cases[name] for name in ("rank", "experts")}
    return bool(run_passes(lever, layers, low, 30, seed=1).wrong_P.any())


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Switch the lever downgrade under load.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-passes", type=int, default=10_000)
    args = parser.parse_args()
    if args.num_passes < SAMPLE_PASSES:
        parser.error(f"--num-passes {args.num_passes}: give {SAMPLE_PASSES} or more")
    device = torch.device(args.device)
    start_s = time.perf_counter()
    layers = [make_layer(seed, SIZES[device.type], device) for seed in range(NUM_LAYERS)]
    cases = make_cases(device, layers)
    check_cases(cases)
    print(f"{time.perf_counter() - start_s:.0f} s: references made", flush=True)
    lanes = HostLanes() if device.type == "cpu" else StreamLanes(device)
    outcome = run_passes(make_lever(layers, lanes, device), layers, cases, args.num_passes)
    first, last = outcome.samples[0], outcome.samples[-1]
    print(
        f"{time.perf_counter() - start_s:.0f} s: {args.num_passes} passes of {NUM_LAYERS} layers, "
        f"{outcome.num_switches} switches, {outcome.num_low_layers} layers low, "
        f"{int((outcome.wrong_P > 0).sum())} passes wrong, {outcome.num_host_waits} host waits\n"
        f"bytes allocated, reserved, host: {first} after {SAMPLE_PASSES} passes, {last} at the end"
    )
    found = list(problems(outcome))
    if device.type == "cuda" and is_wrong(layers, cases, LateLanes(device)):
        found.append("passes with late conversions are wrong")
    if device.type == "cuda" and not is_wrong(layers, cases, DeafLanes(device)):
        found.append("passes that do not wait for late conversions were not found wrong")
    print(*(f"FAIL: {text}" for text in found), sep="\n")
    print("not ok" if found else "ok", f"{time.perf_counter() - start_s:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
