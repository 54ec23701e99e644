"""Host time of our steps in a prefill pass: per layer in mode replicate, per pass without a lever.

    python -m benchmarks.bench_host_cost [--tokens 1024] [--passes 60] [--rows FILE] [--look-up]

One rank drives the real `Runtime` as SGLang's seams do, with nothing else on the device and a sync
before every layer, so that no launch waits for room in a queue. Each step is timed without the
steps inside it; the timers add about a microsecond to every call. With a CUDA device the kernels
run. Without one they are compiled for Hopper and not launched (Triton needed): what is left is
Python, allocations and the operations of torch, which then compute on the host. On a CPU that
others share the lowest tenth of the passes says most. `--look-up` launches every kernel as Triton
does, which looks everything up at each launch.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
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
from sglang_moelb.ep import controller_link, observe, open_pass, points, records, runtime
from sglang_moelb.ep.controller_link import ControllerLink
from sglang_moelb.ep.exchange import Agreement, exchange_for
from sglang_moelb.ep.low.lanes import HostLanes, lanes_of
from sglang_moelb.ep.modality import PLAIN, Requests, RowWindow
from sglang_moelb.ep.replicas import lever as replica_lever
from sglang_moelb.ep.replicas import plan as replica_plan
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.memory import LayerExperts
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.types import Topology

NUM_LAYERS, NUM_EXPERTS, TOPK, NUM_SLOTS = 12, 128, 8, 8
EXPERT_SHAPES = ((64, 32), (32, 32))  # small, since the time of the copies themselves is not asked
WARM_UP = 12
MODES = ("replicate", "observe")


class TopKOutput(NamedTuple):
    """SGLang's top-k output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Dispatcher:
    """SGLang's DeepEP dispatcher and its part for normal mode, as far as we ask them."""

    def __init__(self) -> None:
        self.dispatch_mode = SimpleNamespace(name="NORMAL")
        self.num_experts = NUM_EXPERTS

    def _get_impl(self) -> Any:
        return self

    def _get_buffer(self) -> None:
        """It is there."""


class Steps:
    """Time of named steps, each without the steps inside it."""

    def __init__(self) -> None:
        self.us: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose time counts for `name`."""

        @functools.wraps(work)
        def timing(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun_s = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                whole = 1e6 * (time.perf_counter() - begun_s)
                self.us[name] += whole - self._inner.pop()
                self._inner[-1] += whole
                self.calls[name] += 1

        return timing

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time `owner.attribute` from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def compile_without_launching() -> None:
    """Let the ops take their Triton kernels on the host, behind a driver that launches nothing."""
    import tests.kernels.no_gpu_driver  # noqa: F401
    from sglang_moelb.kernels.count_experts import kernel as count
    from sglang_moelb.kernels.place_replicas import kernel as place
    from sglang_moelb.kernels.pull_experts import kernel as pull
    from sglang_moelb.kernels.reroute import kernel as deal

    observe.count_layers = replica_plan.count_layers = count.count_layers
    replica_plan.place_replicas = place.place_replicas
    replica_lever.pull_experts, replica_lever.reroute = pull.pull_experts, deal.reroute


def look_up_at_each_launch() -> None:
    """Forget what `Launcher` holds, at each launch."""
    from sglang_moelb.kernels.launch import Launcher

    held = Launcher.__call__

    def launch(self: Launcher, *args: Any) -> None:
        self._held.clear()
        held(self, *args)

    Launcher.__call__ = launch  # type: ignore[method-assign]


def make_runtime(mode: str, device: torch.device, dispatchers: list[Any], layers: list[Any]) -> Any:
    """The runtime of the only rank, its controller, and its exchange and lanes."""
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=1, topk=TOPK
    )
    wanted = {"mode": mode, "capacity": {"min_batch_tokens": 16}}
    wanted["controller"] = {"timeout_ms": 60_000.0}
    wanted["replicate"] = {"slots": NUM_SLOTS}
    config = merge(Config(), wanted)
    seat = Seat(
        topology=topology,
        rank=0,
        device=device,
        window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
        layer_of_dispatcher={id(d): layer for layer, d in enumerate(dispatchers)},
        scoring=("softmax",) * NUM_LAYERS,
        form="patch",
    )
    group = dist.group.WORLD
    host = dist.new_group(backend="gloo") if device.type == "cuda" else group
    exchange = exchange_for(
        group, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, device=device, one_host=True
    )
    lanes = HostLanes() if device.type == "cpu" else lanes_of(device)
    lever = ReplicateLever(
        layers,
        [make_experts(device) for _ in range(NUM_LAYERS)],
        topology=topology,
        rank=0,
        lanes=lanes,
    )
    controller = ControllerLink(topology, config, rank=0, device=device)
    made = Runtime(
        seat, config, Agreement(host, one_host=True), exchange, controller, replicate=lever
    )
    return SimpleNamespace(runtime=made, controller=controller, exchange=exchange, lanes=lanes)


def make_experts(device: torch.device) -> LayerExperts:
    """Weights of a layer with slots behind the own experts."""
    whole = [
        torch.zeros(NUM_EXPERTS + NUM_SLOTS, *shape, dtype=torch.bfloat16, device=device)
        for shape in EXPERT_SHAPES
    ]
    own = [weights[:NUM_EXPERTS] for weights in whole]
    return LayerExperts(w13=whole[0], w2=whole[1], w13_R=(own[0],), w2_R=(own[1],))


def watch(steps: Steps, made: Any) -> None:
    """Time what happens inside the seams."""
    steps.wrap(replica_plan, "count_layers", "count")
    steps.wrap(replica_plan, "place_replicas", "place")
    steps.wrap(replica_lever, "reroute", "reroute")
    steps.wrap(replica_lever, "pull_experts", "pull")
    steps.wrap(observe, "count_layers", "count")
    steps.wrap(made.exchange, "gather", "exchange")
    steps.wrap(runtime, "observe", "stack and views")
    for name in ("mark", "mark_aside", "wait"):
        steps.wrap(made.lanes, name, "lanes: events")
    steps.wrap(made.lanes, "aside", "lanes: to the side, making")
    for module in (runtime, records, open_pass):
        steps.wrap(module, "mark_on", "marks of times")
    steps.wrap(records, "close", "counts to the host")
    steps.wrap(records, "told_of", "what copies did")
    steps.wrap(records, "raw_of", "times of the pass before")
    steps.wrap(controller_link, "encode", "message")
    steps.wrap(made.controller, "submit", "hand over")
    steps.wrap(made.controller, "policy", "policies taken")


def one_pass(steps: Steps, device: torch.device, given: Any, work: Any) -> None:
    """Drive the seams of one pass; `given` are its batch and top-k outputs, `work` its layers."""
    ready = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ready()
    steps.timed("begin, rest", points.begin_pass)(None, given.batch)
    for dispatcher, layer, output in zip(work.dispatchers, work.layers, given.outputs, strict=True):
        ready()
        steps.timed("before dispatch, rest", points.before_dispatch)(
            dispatcher, given.hidden_TD, output
        )
        steps.timed("experts, rest", points.run_experts)(layer, None)
        steps.timed("experts, rest", points.after_experts)(dispatcher)
        steps.timed("experts, rest", points.after_combine)(dispatcher)
    ready()
    steps.timed("end, rest", points.end_pass)(None)


def measure(mode: str, device: torch.device, num_tokens: int, num_passes: int) -> dict[str, Any]:
    """Microseconds a pass by step, over the passes."""
    rng = torch.Generator().manual_seed(3)
    weights_TK, ids_TK = torch.topk(torch.rand(num_tokens, NUM_EXPERTS, generator=rng), TOPK)
    output = TopKOutput(weights_TK.to(device), ids_TK.to(device), weights_TK.to(device))
    method = SimpleNamespace(apply=lambda layer, dispatch_output: dispatch_output)
    work = SimpleNamespace(
        dispatchers=[Dispatcher() for _ in range(NUM_LAYERS)],
        layers=[SimpleNamespace(quant_method=method) for _ in range(NUM_LAYERS)],
    )
    requests = Requests(runs=((num_tokens, PLAIN),), phase="prefill")
    ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    given = SimpleNamespace(
        batch=SimpleNamespace(input_ids=ids_T, moelb_requests=requests, mm_inputs=None),
        outputs=[output] * NUM_LAYERS,
        hidden_TD=torch.zeros(num_tokens, 8, device=device),
    )
    made = make_runtime(mode, device, work.dispatchers, work.layers)
    points.attach(made.runtime)
    for seam in SEAMS:
        points.num_passed[seam.name] += 1
    steps = Steps()
    originals = {m: dict(vars(m)) for m in WATCHED}
    watch(steps, made)
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(WARM_UP + num_passes):
        steps.us.clear()
        steps.calls.clear()
        one_pass(steps, device, given, work)
        time.sleep(0.002)
        if number >= WARM_UP:
            for name, us in steps.us.items():
                taken[name].append(us)
            taken["all"].append(sum(steps.us.values()))
    calls = dict(steps.calls)
    for module, names in originals.items():
        vars(module).update(names)
    made.controller.stop()
    KEPT.append(made)
    return {
        "mode": mode,
        "tokens": num_tokens,
        "passes": num_passes,
        "calls": calls,
        "median_us": {name: round(float(np.median(us)), 1) for name, us in taken.items()},
        "p10_us": {name: round(float(np.percentile(us, 10)), 1) for name, us in taken.items()},
    }


KEPT: list[Any] = []  # memory that the driver has registered must not be mapped again
WATCHED = (replica_plan, replica_lever, observe, runtime, records, open_pass, controller_link)


def show(row: dict[str, Any]) -> None:
    """A line a step."""
    print(f"\n{row['mode']}, {row['tokens']} tokens, {NUM_LAYERS} layers, {row['passes']} passes; "
          f"microseconds of host time")  # fmt: skip
    print(f"{'step':28}{'calls':>6}{'median':>9}{'p10':>8}{'median a layer':>16}{'p10':>8}")
    for name, us in sorted(row["median_us"].items(), key=lambda item: -item[1]):
        p10 = row["p10_us"][name]
        print(f"{name:28}{row['calls'].get(name, ''):>6}{us:9.0f}{p10:8.0f}"
              f"{us / NUM_LAYERS:16.1f}{p10 / NUM_LAYERS:8.1f}")  # fmt: skip


def main() -> None:
    """Measure both modes on the one device there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--rows", type=Path, help="append a line of JSON for each mode")
    parser.add_argument("--look-up", action="store_true", help="launch through Triton's look-up")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    if not has_gpu:
        compile_without_launching()
    if asked.look_up:
        look_up_at_each_launch()
    name = torch.cuda.get_device_name() if has_gpu else "no device, kernels compiled only"
    print(f"{name}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        for num_tokens in asked.tokens:
            for mode in MODES:
                row = measure(mode, device, num_tokens, asked.passes)
                show(row)
                if asked.rows:
                    told = {"device": name, "look_up": asked.look_up, **row}
                    with asked.rows.open("a") as file:
                        file.write(json.dumps(told) + "\n")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
