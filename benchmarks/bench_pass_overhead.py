"""Host time that the plugin takes from one rank's serving thread in a prefill pass, without a GPU.

    python -m benchmarks.bench_pass_overhead [--ranks 2] [--mode observe] [--passes 300] [--profile]

Rank 0 drives the real `Runtime` on CPU tensors as SGLang's seams do: 12 MoE layers of 128 experts,
1,024 rows, top-8; the other ranks do the same beside it over gloo. Between the layers it sleeps, as
a serving thread that waits for the device does. Printed are median, p10 and p90 of CPU microseconds
a pass: of the serving thread in `begin_pass`, in the points of all layers and in `end_pass`, and of
our own threads in the serving process beside it, in which they hold its interpreter lock. The
tensors' own arithmetic (stack, count, gather) is launches on a GPU; it is shown apart.
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
from sglang_moelb.ep.exchange import Agreement, Exchange
from sglang_moelb.ep.modality import Requests, RowWindow
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.types import Topology

NUM_LAYERS, NUM_EXPERTS, NUM_ROWS, TOPK = 12, 128, 1024, 8
WARM_UP, SEED = 40, 3
LAYER_S = 0.0003  # the device's part of a layer, in which the serving thread waits
PREFILL = Requests(runs=((NUM_ROWS, False),), phase="prefill")


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


class Pass:
    """One prefill pass, over and over, and the time of its parts."""

    def __init__(self, group: dist.ProcessGroup, config: Config) -> None:
        rng = torch.Generator().manual_seed(SEED + dist.get_rank(group))
        shape = (NUM_ROWS, NUM_EXPERTS)
        logits_L = [torch.randn(shape, generator=rng) for _ in range(NUM_LAYERS)]
        top_L = [torch.topk(logits_TE.softmax(-1), TOPK) for logits_TE in logits_L]
        self._outputs = [
            TopKOutput(weights_TK, ids_TK, logits_TE)
            for (weights_TK, ids_TK), logits_TE in zip(top_L, logits_L, strict=True)
        ]
        self._dispatchers = [Dispatcher() for _ in range(NUM_LAYERS)]
        self._hidden_TD = torch.zeros(NUM_ROWS, 8)
        self.runtime = _runtime(group, config, self._dispatchers)
        points.attach(self.runtime)
        self.times_us: defaultdict[str, list[float]] = defaultdict(list)
        self._tensors_us = 0.0
        runtime.observe = self._timing(runtime.observe)

    def run(self, *, sleep: bool = True) -> None:
        """Drive the seams of one pass."""
        batch = SimpleNamespace(
            input_ids=torch.zeros(NUM_ROWS, dtype=torch.int64), moelb_requests=PREFILL
        )
        threads_us = threads_cpu_us()
        self._timed("begin", lambda: points.begin_pass(None, batch))
        layers_us = 0.0
        for dispatcher, output in zip(self._dispatchers, self._outputs, strict=True):
            if sleep:
                time.sleep(LAYER_S)
            begun_cpu_s = time.thread_time()
            points.before_dispatch(dispatcher, self._hidden_TD, output)
            points.before_experts(None, None)
            points.after_experts(dispatcher)
            points.after_combine(dispatcher)
            layers_us += 1e6 * (time.thread_time() - begun_cpu_s)
        self.times_us["layers, all"].append(layers_us)
        self._timed("end", lambda: points.end_pass(None))
        self.times_us["end"][-1] -= self._tensors_us
        self.times_us["end, tensors"].append(self._tensors_us)
        if sleep:
            time.sleep(LAYER_S)
        self.times_us["our threads, CPU"].append(threads_cpu_us() - threads_us)

    def _timing(self, observe: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timing(*args: Any, **kwargs: Any) -> torch.Tensor:
            begun_cpu_s = time.thread_time()
            counts_RLW = observe(*args, **kwargs)
            self._tensors_us = 1e6 * (time.thread_time() - begun_cpu_s)
            return counts_RLW

        return timing

    def _timed(self, part: str, work: Callable[[], object]) -> None:
        begun_cpu_s = time.thread_time()
        work()
        self.times_us[part].append(1e6 * (time.thread_time() - begun_cpu_s))


def threads_cpu_us() -> float:
    """CPU microseconds of all of our threads in this process."""
    return sum(
        1e6 * time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name.startswith("moelb-") and thread.ident is not None
    )


def _runtime(group: dist.ProcessGroup, config: Config, dispatchers: list[Dispatcher]) -> Runtime:
    rank = dist.get_rank(group)
    topology = Topology(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_ranks=dist.get_world_size(group),
        topk=TOPK,
    )
    seat = Seat(
        topology=topology,
        rank=rank,
        device=torch.device("cpu"),
        window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
        layer_of_dispatcher={id(d): layer for layer, d in enumerate(dispatchers)},
        scoring=("softmax",) * NUM_LAYERS,
        form="patch",
    )
    for seam in SEAMS:
        points.num_passed[seam.name] += 1
    controller = (
        ControllerLink(topology, config, rank=rank, device=seat.device) if rank == 0 else None
    )
    return Runtime(seat, config, Agreement(group, one_host=True), Exchange(group), controller)


def serve(rank: int, store: str, given: argparse.Namespace) -> None:
    """All passes of one rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=given.ranks
    )
    group = dist.group.WORLD
    assert group is not None
    config = merge(Config(), {"mode": given.mode, "capacity": {"min_batch_tokens": 16}})
    one = Pass(group, config)
    for _ in range(WARM_UP):
        one.run()
    one.times_us.clear()
    profile = cProfile.Profile()
    if given.profile and rank == 0:
        profile.enable()
    for _ in range(given.passes):
        one.run()
    profile.disable()
    if rank == 0:
        _print(one.times_us, given)
        if given.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    dist.barrier()
    dist.destroy_process_group()


def _print(times_us: dict[str, list[float]], given: argparse.Namespace) -> None:
    print(f"{given.ranks} ranks, {NUM_LAYERS} layers, mode {given.mode}, {given.passes} passes")
    for part, taken_us in times_us.items():
        p10, median, p90 = np.percentile(taken_us, [10, 50, 90])
        print(f"{part:22} median {median:7.0f} us of CPU a pass, p10 {p10:7.0f}, p90 {p90:7.0f}")


def main() -> None:
    """Start the ranks and print one line a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
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
