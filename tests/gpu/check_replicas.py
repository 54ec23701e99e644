"""On a CUDA device: the replica planner and the reroute against their references, then times.

Run from the root: `python tests/gpu/check_replicas.py --out FILE.jsonl`, or with `--small` in place
of `--out` for a quick pass without times, as under `compute-sanitizer`. Ends with status 1 and the
first difference if anything differs. Needs torch, triton and numpy; about a minute, most of it
compiling. Times are of a call in a CUDA graph of 20 (no host, warm L2), of a single call between
events with a cold L2, and of the host; beside them UltraEP 1.0.0 on 4 H100s, where it was measured.

Shape letters: T tokens, K top-k, R ranks, W row width, E experts, S slots of a rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs from a checkout, nothing installed

import bench_place_replicas  # noqa: E402
import bench_reroute  # noqa: E402
from kernel_bench import BenchCase  # noqa: E402
from replica_routings import RoutingCase, expert_rows, make_rows, routed_ids  # noqa: E402

from sglang_moelb.controller import place_replicas as planner  # noqa: E402
from sglang_moelb.controller.place_replicas import CopyCosts  # noqa: E402
from sglang_moelb.kernels.place_replicas import place_replicas  # noqa: E402
from sglang_moelb.kernels.reroute import reroute  # noqa: E402
from sglang_moelb.kernels.testing import assert_close, bench  # noqa: E402
from sglang_moelb.types import IntArray  # noqa: E402

# UltraEP 1.0.0, its own end-to-end test, microseconds: op, tokens a rank, rank skew.
BAR_US = {
    ("place_replicas", 4096, "rank 1.5"): 21,
    ("place_replicas", 4096, "rank 2"): 22,
    ("place_replicas", 4096, "rank 3"): 154,
    ("place_replicas", 16384, "rank 2"): 23,
    ("place_replicas", 16384, "rank 3"): 81,
    ("reroute", 4096, "rank 2"): 14,
    ("reroute", 4096, "rank 3"): 15,
    ("reroute", 16384, "rank 2"): 37,
    ("reroute", 16384, "rank 3"): 37,
}
COSTS = (
    CopyCosts(),
    CopyCosts(min_rows=256),
    CopyCosts(send_rows=300, receive_rows=120, min_rows=64),
)
# Ranks, experts and slots; each is a compilation.
SIZES = ((4, 128, 8), (8, 256, 8), (64, 256, 8), (3, 12, 2), (32, 128, 2))
SMALL_SIZES = ((4, 128, 8), (64, 256, 8), (3, 12, 2))
NUM_SEEDS = 4
TIMED = ((4, 128), (64, 256))
CALLS_IN_GRAPH = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the results, microseconds."""

    op: str
    label: str
    graph_us: float
    cold_us: float
    cold_p10_us: float
    cold_p90_us: float
    host_us: float
    bar_us: float | None
    device: str
    torch: str


def routings(num_ranks: int, num_experts: int, num_seeds: int) -> Iterator[IntArray]:
    """Rows of skewed, tied, empty and extreme routings."""
    sizes = {"num_ranks": num_ranks, "num_experts": num_experts}
    for seed in range(num_seeds):
        for skew in (1.0, 1.5, 2.5, min(4.0, num_ranks)):
            yield expert_rows(RoutingCase(kind="rank", strength=skew, **sizes), 2048, seed)
        yield expert_rows(RoutingCase(kind="expert", strength=0.3, **sizes), 2048, seed)
        yield expert_rows(RoutingCase(kind="zipf", strength=0.3 + seed / 2, **sizes), 2048, seed)
        yield np.random.default_rng(seed).integers(0, 9, (num_ranks, num_experts))
    tied = np.zeros((num_ranks, num_experts), dtype=np.int64)
    yield tied
    tied[:, : num_experts // 2] = 100
    yield tied
    yield np.where(np.arange(num_experts) == num_experts // 2, 1_000_003, 0) * (tied >= 0)
    idle = expert_rows(RoutingCase(kind="rank", strength=2.0, **sizes), 2048)
    idle[num_ranks // 2] = 0
    yield idle


def check_plans(
    num_ranks: int, num_experts: int, num_slots: int, *, num_seeds: int = NUM_SEEDS
) -> int:
    """The device's plan equals the planner's, twice; returns how many were compared."""
    num_plans = 0
    for rows_RE in routings(num_ranks, num_experts, num_seeds):
        rows_RW = make_rows(rows_RE).cuda()
        for costs in COSTS:
            expected = planner.place_replicas(rows_RE, num_slots=num_slots, costs=costs)
            refs = (expected.slots_RS, expected.quota_ER)
            options = {"num_experts": num_experts, "num_slots": num_slots, **asdict(costs)}
            for name in ("first", "second"):
                slots_RS, quota_ER, times_2 = place_replicas(rows_RW, **options)
                what = f"R={num_ranks} E={num_experts} S={num_slots} {costs}, {name} run"
                for ref, out in zip(refs, (slots_RS, quota_ER), strict=True):
                    assert_close(what, torch.from_numpy(ref.astype(np.int32)), out)
                assert times_2.tolist() == [expected.before_rows, expected.after_rows], what
            num_plans += 1
    return num_plans


def check_reroutes(
    num_ranks: int, num_experts: int, num_slots: int, *, small: bool = False
) -> None:
    """The device's ids equal the reference's; those of all ranks meet the quotas."""
    case = RoutingCase(kind="rank", strength=2.0, num_ranks=num_ranks, num_experts=num_experts)
    # Large tiles and 32-bit ids are further compilations, so not every size has them.
    tokens = (0, 1, 3000, 20_000 if (num_ranks, num_experts) in TIMED else 700)
    tokens = (0, 1, 40, 300) if small else tokens
    dtypes = (torch.int64, torch.int32) if num_ranks == 4 else (torch.int64,)
    topk = min(8, num_experts - 1)
    none = torch.zeros(0, topk, dtype=torch.int64)
    ids = [routed_ids(case, n, seed)[:, :topk] for seed, n in enumerate(tokens[:num_ranks])]
    ids += [none] * (num_ranks - len(ids))
    ids[-1] = ids[-1].clone().masked_fill_(torch.rand(ids[-1].shape) < 0.1, -1)
    rows_RE = np.stack([_counted(ids_TK, num_experts) for ids_TK in ids])
    rows_RW = make_rows(rows_RE)
    slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=num_experts, num_slots=num_slots)
    plan = (rows_RW, slots_RS, quota_ER)
    num_places = num_experts // num_ranks + num_slots
    met_R = torch.zeros(num_ranks, dtype=torch.int64)
    for rank, ids_TK in enumerate(ids):
        name = f"reroute R={num_ranks} E={num_experts} rank {rank} T={len(ids_TK)}"
        ref_TK = reroute(ids_TK, *plan, my_rank=rank)
        for dtype in dtypes:
            args = [part.cuda() for part in (ids_TK.to(dtype), *plan)]
            out_TK = reroute(*args, my_rank=rank)
            assert_close(f"{name} {dtype}", ref_TK.to(dtype), out_TK)
        met_R += torch.bincount(ref_TK[ref_TK >= 0] // num_places, minlength=num_ranks)
    assert_close("rows of ranks", quota_ER.sum(dim=0), met_R)


def _counted(ids_TK: Tensor, num_experts: int) -> IntArray:
    return np.bincount(ids_TK[ids_TK >= 0].numpy(), minlength=num_experts)


def graph_us(call: Callable[[], object]) -> float:
    """Time of one call among `CALLS_IN_GRAPH` of a CUDA graph, median of 30 replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            call()
    times_us = []
    for _ in range(33):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / CALLS_IN_GRAPH)
    return statistics.median(times_us[3:])


def timed(case: BenchCase, num_calls: int) -> Row:
    """One case, with the bar where there is one."""
    timing = bench(case.call, num_calls=num_calls)
    num_tokens = int(case.label.split()[0].removeprefix("T="))
    bars = [
        bar
        for (op, tokens, name), bar in BAR_US.items()
        if (op, tokens) == (case.op, num_tokens) and f"R=4 E=128 {name}" in case.label.split(",")[0]
    ]
    return Row(
        op=case.op,
        label=case.label,
        graph_us=graph_us(case.call),
        cold_us=timing.median_us,
        cold_p10_us=timing.p10_us,
        cold_p90_us=timing.p90_us,
        host_us=timing.host_us,
        bar_us=bars[-1] if bars else None,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description="Check and time the replica kernels.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="JSON lines file of the times")
    what.add_argument("--small", action="store_true", help="few small checks, no times")
    parser.add_argument("--num-calls", type=int, default=50, help="timed single calls a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("check_replicas.py needs a CUDA device, and torch sees none")
    for sizes in SMALL_SIZES if args.small else SIZES:
        start_s = time.perf_counter()
        num_plans = check_plans(*sizes, num_seeds=1 if args.small else NUM_SEEDS)
        check_reroutes(*sizes, small=args.small)
        spent_s = time.perf_counter() - start_s
        print(f"equal to the reference: {sizes}, {num_plans} plans, {spent_s:.1f} s", flush=True)
    if args.small:
        return
    rows = []
    print(f"{'op':15}{'case':47}{'graph':>8}{'cold':>8}{'host':>8}{'bar':>6}  microseconds")
    cases = [*bench_place_replicas.make_cases("cuda"), *bench_reroute.make_cases("cuda")]
    for case in cases:
        row = timed(case, args.num_calls)
        times = f"{row.graph_us:8.1f}{row.cold_us:8.1f}{row.host_us:8.1f}{row.bar_us or '':>6}"
        print(f"{row.op:15}{row.label:47}{times}", flush=True)
        rows.append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
