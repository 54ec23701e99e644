"""On a GPU: experts of a placement's mxfp4, on SGLang's Marlin, alone; ends with an error.

    python3 tests/gpu/check_marlin.py

No server and no DeepEP: one rank whose last experts are stored in mxfp4, on rows as DeepEP's two
modes give them. Each row must be the float32 sum of decoded weights within what bfloat16 rounds,
the same bits in every call, and in low latency those of a CUDA graph that is replayed on other
rows and numbers. Then the layer is timed beside one with fp8 and one all in bfloat16. Compiling
Marlin takes minutes the first time, the rest one. `--device cpu` runs the host's form of it.

Shape letters: N rows, K top-k, P places, M rows of room, H hidden size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"  # else minutes of compiling
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # runs from a checkout

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from graphs import captured  # noqa: E402

from benchmarks.gpu.one_layer import LayerSizes, copied, make_layer, received_rows  # noqa: E402
from sglang_moelb.ep.expert_rows import WEIGHTS  # noqa: E402
from sglang_moelb.ep.low import marlin_library  # noqa: E402
from sglang_moelb.ep.resident.experts import ResidentExperts  # noqa: E402
from sglang_moelb.ep.resident.formats import FORMATS  # noqa: E402
from sglang_moelb.ep.resident.weights import store  # noqa: E402
from sglang_moelb.kernels.block_format import BlockFormat, fake_quantise_fp4  # noqa: E402
from sglang_moelb.placement import LayerPlacement, layout  # noqa: E402
from sglang_moelb.types import Topology  # noqa: E402

# Of a row, relative: bfloat16 rounds four times by 0.2 % in the mean; wrong bytes give 1.
BOUND = 0.02
CALLS, TIMES = 5, 30


def stored_layer(sizes: LayerSizes, name: str, num_low: int, device: torch.device) -> Any:
    """A layer whose last experts are low in format `name`, what runs it, and its plain weights."""
    layer = make_layer(0, sizes, device)
    plain = [getattr(layer, weight).data.clone() for weight in WEIGHTS]
    count = sizes.num_experts
    topology = Topology(num_layers=1, num_experts=count, num_ranks=1, topk=sizes.topk)
    place = layout(LayerPlacement(low_experts=tuple(range(count - num_low, count))), topology, 0)
    stored = store(layer, place, rank=0, group=dist.group.WORLD, low_format=FORMATS[name])
    resident = ResidentExperts([layer], [stored], [place], rank=0)
    return SimpleNamespace(
        layer=layer, plain=plain, num_high=stored.num_high,
        run=lambda rows: resident.run(layer, rows).hidden_states,
    )  # fmt: skip


def computed(x_NH: torch.Tensor, state: Any, expert: int) -> torch.Tensor:
    """Rows by one expert in float32, of the values that are stored."""
    w13, w2 = (one[expert : expert + 1] for one in state.plain)
    if expert >= state.num_high:
        w13, w2 = (fake_quantise_fp4(one, BlockFormat.MXFP4_CEIL) for one in (w13, w2))
    gate, up = (x_NH.float() @ w13[0].float().T).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ w2[0].float().T


def check_near(what: str, out: torch.Tensor, truth: torch.Tensor) -> float:
    """The farthest row, relative."""
    apart, size = (out.float() - truth).norm(dim=-1), truth.norm(dim=-1)
    worst = float((apart / size.clamp(min=1e-6)).max()) if len(out) else 0.0
    if not bool(out.isfinite().all()) or worst > BOUND:
        raise SystemExit(f"{what}: a row is {worst:.3f} from its decoded experts")
    return worst


def loads(sizes: LayerSizes, num_low: int, many: int) -> dict[str, list[int]]:
    """Rows of each place, in normal mode."""
    num_high = sizes.num_experts - num_low
    drawn = torch.Generator().manual_seed(1)
    skewed = (many * torch.rand(sizes.num_experts, generator=drawn) ** 4).int().tolist()
    return {
        "even": [many // 4] * sizes.num_experts,
        "skewed": skewed,
        "low only": [0] * num_high + [many // 4, 0, 1] + [7] * (num_low - 3),
        "one low row": [9] * num_high + [1] + [0] * (num_low - 1),
        "all on a low one": [0] * num_high + [many] + [0] * (num_low - 1),
        "high only": [many // 4] * num_high + [0] * num_low,
    }


def check_normal(state: Any, sizes: LayerSizes, num_low: int, many: int, device: Any) -> None:
    """Rows of DeepEP's normal mode: near the truth, and the same bits in every call."""
    for name, rows_e in loads(sizes, num_low, many).items():
        given = received_rows(3, rows_e, min(sizes.topk, 4), sizes, device)
        out_NH = state.run(copied(given))
        truth_NH = torch.zeros(out_NH.shape, device=device)
        for expert in range(sizes.num_experts):
            row, column = (given.topk_ids == expert).nonzero(as_tuple=True)
            part = computed(given.hidden_states[row], state, expert)
            truth_NH.index_add_(0, row, part * given.topk_weights[row, column, None])
        worst = check_near(name, out_NH, truth_NH)
        for _ in range(CALLS):
            if not torch.equal(state.run(copied(given)), out_NH):
                raise SystemExit(f"{name}: two calls differ")
        print(f"normal mode, {name}, {len(out_NH)} rows: worst row {worst:.4f}, same bits")


def masked_rows(sizes: LayerSizes, room: int, device: Any) -> Any:
    """What DeepEP's low-latency dispatch gives, to be filled."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput

    shape = sizes.num_experts, room, sizes.hidden
    return DeepEPLLDispatchOutput(
        torch.zeros(shape, dtype=torch.bfloat16, device=device), None,
        torch.zeros(1, sizes.topk, dtype=torch.int64, device=device),
        torch.ones(1, sizes.topk, device=device),
        torch.ones(sizes.num_experts, dtype=torch.int32, device=device), 4,
    )  # fmt: skip


def fill(rows: Any, numbers: list[int], seed: int) -> torch.Tensor:
    """Other rows; what has not come is NaN. Returns the rows."""
    drawn = torch.Generator().manual_seed(seed)
    x_PMH = torch.randn(rows.hidden_states.shape, generator=drawn).bfloat16()
    for place, count in enumerate(numbers):
        x_PMH[place, count:] = float("nan")
    rows.hidden_states.copy_(x_PMH)
    rows.masked_m.copy_(torch.tensor(numbers, dtype=torch.int32))
    return rows.hidden_states


def view_of(rows: Any) -> Any:
    """The same rows in a tensor of its own, as SGLang's runner gives up the one that it is given.
    """
    return rows._replace(hidden_states=rows.hidden_states.view(rows.hidden_states.shape))


def check_masked(state: Any, sizes: LayerSizes, room: int, device: Any) -> None:
    """Rows of DeepEP's low-latency mode, in one graph with other rows and numbers."""
    rows, count = masked_rows(sizes, room, device), sizes.num_experts
    fill(rows, [1] * count, 0)
    replay = captured(lambda: state.run(view_of(rows)), device.type)
    drawn = torch.Generator().manual_seed(2)
    numbers = {
        "none": [0] * count,
        "one low row": [0] * (count - 1) + [1],
        "few": torch.randint(0, 5, (count,), generator=drawn).tolist(),
        "uneven": torch.randint(0, room + 1, (count,), generator=drawn).tolist(),
        "full": [room] * count,
    }
    for seed, (name, num_rows_P) in enumerate(numbers.items()):
        x_PMH = fill(rows, num_rows_P, seed).clone()
        out_PMH = state.run(view_of(rows)).clone()
        replayed = [replay().clone() for _ in range(CALLS)]
        worst = 0.0
        for place, num_rows in enumerate(num_rows_P):
            mine = out_PMH[place, :num_rows]
            truth = computed(x_PMH[place, :num_rows], state, place)
            worst = max(worst, check_near(f"{name}, place {place}", mine, truth))
            if any(not torch.equal(one[place, :num_rows], mine) for one in replayed):
                raise SystemExit(f"{name}, place {place}: the graph's rows are not the eager ones")
        print(f"low latency, {name}: worst row {worst:.4f}, a graph's bits are the eager ones")


def medians_us(steps: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Median, least and most time of each step in microseconds, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TIMES):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times[name].append(1000 * begin.elapsed_time(end))
    return {
        name: f"{statistics.median(one[5:]):.1f} us ({min(one[5:]):.1f} to {max(one[5:]):.1f})"
        for name, one in times.items()
    }


def compare_times(sizes: LayerSizes, num_low: int, room: int, device: torch.device) -> None:
    """The experts of a layer in either mode: all in bfloat16, and some in fp8 or mxfp4."""
    states = {name: stored_layer(sizes, name, num_low, device) for name in FORMATS}
    stock = make_layer(0, sizes, device)
    runs = {"bfloat16": lambda rows: stock.quant_method.apply(stock, rows).hidden_states}
    runs |= {name: state.run for name, state in states.items()}
    for per_expert in (256, 2048):
        given = received_rows(5, [per_expert] * sizes.num_experts, 4, sizes, device)
        steps = {
            name: lambda run=run, given=given: run(copied(given)) for name, run in runs.items()
        }
        steps["copy of the rows, in all"] = lambda given=given: copied(given)
        for name, shown in medians_us(steps).items():
            print(f"normal mode, {per_expert} rows an expert, {name}: {shown}")
    for per_expert in (1, 4, 32):
        rows = masked_rows(sizes, room, device)._replace(expected_m=per_expert)
        fill(rows, [per_expert] * sizes.num_experts, 1)
        steps = {
            name: captured(lambda run=run, rows=rows: run(view_of(rows)), device.type)
            for name, run in runs.items()
        }
        for name, shown in medians_us(steps).items():
            print(f"low latency, {per_expert} rows an expert, graph, {name}: {shown}")


def main() -> None:
    """Parse, store, check, time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type == "cuda"
    sizes = LayerSizes(num_experts=64) if on_gpu else LayerSizes(
        num_experts=8, hidden=256, inner=128, topk=4
    )  # fmt: skip
    num_low, room, many = (9, 256, 4096) if on_gpu else (4, 32, 96)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    if on_gpu:
        print(torch.cuda.get_device_name())
        if refusal := marlin_library.library_refusal():
            raise SystemExit(": ".join(refusal))
    with torch.inference_mode():
        began = time.perf_counter()
        state = stored_layer(sizes, "mxfp4", num_low, device)
        state.run(received_rows(0, [4] * sizes.num_experts, 2, sizes, device)).sum().item()
        print(f"stored, and run once, after {time.perf_counter() - began:.1f} s")
        check_normal(state, sizes, num_low, many, device)
        check_masked(state, sizes, room, device)
        if on_gpu:
            compare_times(sizes, num_low, room, device)
    print("ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
