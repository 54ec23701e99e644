"""Host time that the plugin takes from one rank's serving thread in a prefill pass.

    python -m benchmarks.bench_pass_overhead [--ranks 2] [--mode observe] [--passes 300] [--profile]
    python -m benchmarks.bench_pass_overhead --ranks 2 --device cuda

Every rank drives the real `Runtime` as SGLang's seams do: 12 MoE layers of 128 experts, 1,024 rows,
top-8. Between the layers it sleeps, as a serving thread that waits for the device does. What the
controller process says of the last passes must equal a plain count of what all ranks routed, or
the command fails; then rank 0 prints median, p10 and p90 of microseconds of its CPU a pass: of the
serving thread in `begin_pass`, in the points of all layers and in `end_pass`, and of our own
threads in the serving process beside it, in which they hold its interpreter lock. Stack, count and
exchange are launches on a GPU and arithmetic on a CPU; they are shown apart.

Shape letters: T rows, K top-k, E experts, R ranks, L layers, W width of a row of counts, D hidden.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import pstats
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from sglang_moelb.config import Config, merge
from sglang_moelb.ep import points, runtime
from sglang_moelb.ep.controller_link import ControllerLink
from sglang_moelb.ep.exchange import Agreement, exchange_for
from sglang_moelb.ep.modality import PLAIN, Requests, RowWindow
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap
from sglang_moelb.types import Topology

NUM_LAYERS, NUM_EXPERTS, NUM_ROWS, TOPK = 12, 128, 1024, 8
NUM_ROUTINGS, WARM_UP, SEED = 5, 40, 3
LAYER_S = 0.0003  # the device's part of a layer, in which the serving thread waits
READ_TIMEOUT_S = 10.0
PREFILL = Requests(runs=((NUM_ROWS, PLAIN),), phase="prefill")


class TopKOutput(NamedTuple):
    """SGLang's top-k output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Dispatcher:
    """SGLang's DeepEP dispatcher, as far as we ask it."""

    def __init__(self) -> None:
        self._impl = SimpleNamespace(dispatch_mode=SimpleNamespace(name="NORMAL"))

    def _get_impl(self) -> Any:
        return self._impl


class Groups(NamedTuple):
    """The two groups of all ranks."""

    host: dist.ProcessGroup
    device: dist.ProcessGroup


class Passes:
    """One prefill pass after another, each routed otherwise, and the times of their parts."""

    def __init__(self, groups: Groups, config: Config, device: torch.device) -> None:
        self._device = device
        rank = dist.get_rank(groups.host)
        rng = torch.Generator().manual_seed(SEED + rank)
        self._routings = [
            [_routed(rng, device) for _ in range(NUM_LAYERS)] for _ in range(NUM_ROUTINGS)
        ]
        self._dispatchers = [Dispatcher() for _ in range(NUM_LAYERS)]
        self._hidden_TD = torch.zeros(NUM_ROWS, 8, device=device)
        self._input_ids_T = torch.zeros(NUM_ROWS, dtype=torch.int64, device=device)
        self.runtime = _runtime(groups, config, device, self._dispatchers)
        points.attach(self.runtime)
        self.times_us: defaultdict[str, list[float]] = defaultdict(list)
        self._num_passes = 0
        self._observing_us = 0.0
        runtime.observe = self._timing(runtime.observe)

    def rows_of_routings_R(self, num_ranks: int) -> list[list[int]]:
        """Rows that this rank sends to each rank, for each routing."""
        per_rank = NUM_EXPERTS // num_ranks
        return [
            sum(
                torch.bincount(output.topk_ids.cpu().flatten() // per_rank, minlength=num_ranks)
                for output in layers
            ).tolist()
            for layers in self._routings
        ]

    def run(self) -> None:
        """Drive the seams of one pass."""
        batch = SimpleNamespace(
            input_ids=self._input_ids_T, moelb_requests=PREFILL, mm_inputs=None
        )
        outputs = self._routings[self._num_passes % NUM_ROUTINGS]
        self._num_passes += 1
        threads_us = threads_cpu_us()
        self._timed("begin", lambda: points.begin_pass(None, batch))
        layers_us = 0.0
        for dispatcher, output in zip(self._dispatchers, outputs, strict=True):
            time.sleep(LAYER_S)
            begun_s = time.thread_time()
            points.before_dispatch(dispatcher, self._hidden_TD, output)
            points.run_experts(None, None)
            points.after_experts(dispatcher)
            points.after_combine(dispatcher)
            layers_us += 1e6 * (time.thread_time() - begun_s)
        self.times_us["layers, all"].append(layers_us)
        self._timed("end", lambda: points.end_pass(None))
        self.times_us["end"][-1] -= self._observing_us
        self.times_us["end, observing"].append(self._observing_us)
        time.sleep(LAYER_S)
        self.times_us["our threads"].append(threads_cpu_us() - threads_us)

    def _timing(self, observe: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            begun_s = time.thread_time()
            counts_RLW = observe(*args, **kwargs)
            self._observing_us = 1e6 * (time.thread_time() - begun_s)
            return counts_RLW

        return timing

    def _timed(self, part: str, work: Callable[[], object]) -> None:
        begun_s = time.thread_time()
        work()
        self.times_us[part].append(1e6 * (time.thread_time() - begun_s))


def threads_cpu_us() -> float:
    """CPU microseconds of all of our threads in this process."""
    return sum(
        1e6 * time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name.startswith("moelb-") and thread.ident is not None
    )


def _routed(rng: torch.Generator, device: torch.device) -> TopKOutput:
    popularity_E = torch.randn(NUM_EXPERTS, generator=rng)
    logits_TE = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=rng) + popularity_E
    weights_TK, ids_TK = torch.topk(logits_TE.softmax(-1), TOPK)
    return TopKOutput(weights_TK.to(device), ids_TK.int().to(device), logits_TE.to(device))


def _runtime(
    groups: Groups, config: Config, device: torch.device, dispatchers: list[Dispatcher]
) -> Runtime:
    rank, num_ranks = dist.get_rank(groups.host), dist.get_world_size(groups.host)
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK
    )
    seat = Seat(
        topology=topology,
        rank=rank,
        device=device,
        window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
        layer_of_dispatcher={id(d): layer for layer, d in enumerate(dispatchers)},
        scoring=("softmax",) * NUM_LAYERS,
        form="patch",
    )
    for seam in SEAMS:
        points.num_passed[seam.name] += 1
    exchange = exchange_for(
        groups.device,
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        device=device,
        one_host=True,
    )
    controller = ControllerLink(topology, config, rank=rank, device=device) if rank == 0 else None
    return Runtime(seat, config, Agreement(groups.host, one_host=True), exchange, controller)


def serve(rank: int, store: str, given: argparse.Namespace) -> None:
    """All passes of one rank; rank 0 checks and prints."""
    torch.set_num_threads(1)
    on_gpu = given.device == "cuda"
    close_torchvision_gap()  # the status imports parts of SGLang, and it torchvision
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=given.ranks,
    )
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(dist.new_group(backend="gloo") if on_gpu else world, world)
    config = merge(
        Config(),
        {
            "mode": given.mode,
            "capacity": {"min_batch_tokens": 16},
            "controller": {"timeout_ms": 5000.0},
        },
    )
    passes = Passes(groups, config, torch.device(given.device))
    for _ in range(WARM_UP):
        passes.run()
    passes.times_us.clear()
    profile = cProfile.Profile()
    if given.profile and rank == 0:
        profile.enable()
    for _ in range(given.passes):
        passes.run()
    profile.disable()
    _check(passes, groups.host, rank)
    if rank == 0:
        _print(passes.times_us, given)
        if given.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    dist.barrier(groups.host)
    dist.destroy_process_group()


def _check(passes: Passes, group: dist.ProcessGroup, rank: int) -> None:
    """End the command unless the controller counted what all ranks routed."""
    num_ranks = dist.get_world_size(group)
    sent: list[Any] = [None] * num_ranks
    dist.all_gather_object(sent, passes.rows_of_routings_R(num_ranks), group=group)
    if rank != 0:
        return
    expected = np.array(sent).sum(axis=0).tolist()
    deadline_s = time.monotonic() + READ_TIMEOUT_S
    status = passes.runtime.status()
    while status["totals"]["num_passes"] < status["controller"]["num_passes"]:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"passes were not read: {status['controller']}, {status['totals']}")
        time.sleep(0.05)
        status = passes.runtime.status()
    for row in status["recent"]:
        routing = row["step"] % NUM_ROUTINGS
        if row["rows_before_R"] != expected[routing]:
            raise SystemExit(f"pass {row['step']}: rows {row['rows_before_R']} where "
                             f"{expected[routing]} were routed")  # fmt: skip
    print(f"checked: rows of the last {len(status['recent'])} of {status['num_passes']} passes")


def _print(times_us: dict[str, list[float]], given: argparse.Namespace) -> None:
    print(f"{given.ranks} ranks on {given.device}, {NUM_LAYERS} layers, mode {given.mode}, "
          f"{given.passes} passes")  # fmt: skip
    for part, taken_us in times_us.items():
        p10, median, p90 = np.percentile(taken_us, [10, 50, 90])
        print(f"{part:15} median {median:6.0f} us of CPU a pass, p10 {p10:6.0f}, p90 {p90:6.0f}")


def main() -> None:
    """Start the ranks; ends with an error if one does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", default="observe")
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="cProfile of rank 0's passes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=serve, args=(rank, store, given), daemon=True)
            for rank in range(1, given.ranks)
        ]
        for other in others:
            other.start()
        serve(0, store, given)
        for other in others:
            other.join(timeout=10.0)


if __name__ == "__main__":
    main()
