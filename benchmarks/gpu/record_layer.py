"""Profile MoE layers under the lever downgrade with DeepEP, for a picture of one of them.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.gpu.record_layer --out DIR

Needs 2 or 4 GPUs of one host and SGLang with DeepEP and DeepGEMM. Every rank holds 32 experts of
Qwen3-30B-A3B and sends 16,384 tokens, all vision; one rank gets `--skew` times the mean rows and is
lowered by the rule. A layer is what the server does with it: count, exchange and plan, conversion
started, layout and dispatch, experts, combine. Writes `trace-rank<r>.json.gz` of four layers, times
of layers with and without the lever (medians, slowest rank), and the picture of the hot rank.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import result_rows
from benchmarks.gpu.draw_layer import draw, layer_view, load, work_of
from benchmarks.gpu.one_layer import LayerSizes, make_layer
from benchmarks.gpu.sent_rows import combine, dispatch, make_buffer
from benchmarks.gpu.skew_plugin import skewed_ids
from sglang_moelb.ab.theme import LIGHT, render
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import exchange_for
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.kernels.row_layout import FLAG_VISION
from sglang_moelb.types import Lever, Policy, Topology

NUM_LAYERS, HOT = 4, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """What a rank needs for a layer."""

    rank: int
    topology: Topology
    buffer: Any
    exchange: Any
    layers: list[Any]
    lever: DowngradeLever
    routed: LayerInput
    policy: Policy

    def run_layer(self, number: int, low: bool) -> torch.Tensor:
        """One layer from its routing to the combined rows."""
        layer = self.layers[number]
        if low:
            plan = plan_low(self.routed, self.policy, self.topology, self.exchange)
            self.lever.prepare(number, plan.low_E)
        rows, handle = dispatch(
            self.buffer, self.routed, self.routed.ids_TK, self.topology.num_experts
        )
        out = self.lever.run(layer, rows) if low else None
        if out is None:
            out = layer.quant_method.apply(layer, rows)
        return combine(self.buffer, out, handle)


def make_rig(num_tokens: int, skew: float) -> Rig:
    """The layers, buffers and routing of this rank; collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = LayerSizes()
    num_experts = sizes.num_experts * num_ranks
    layers = [make_layer(10 * rank + number, sizes, device) for number in range(NUM_LAYERS)]
    staging = Staging(layers, num_slots=2, resident=(), lanes=lanes_of(device))
    ids = skewed_ids(skew, HOT, num_ranks, num_experts, sizes.topk, device.index)
    weights_TK = torch.rand(num_tokens, sizes.topk, device=device)
    routed = LayerInput(
        layer=0,
        ids_TK=ids[rank * num_tokens : (rank + 1) * num_tokens].contiguous(),
        weights_TK=weights_TK / weights_TK.sum(dim=1, keepdim=True),
        logits_TE=torch.empty(0, device=device),
        hidden_TD=torch.randn(num_tokens, sizes.hidden, device=device).bfloat16(),
        flags_T=torch.full((num_tokens,), FLAG_VISION, dtype=torch.uint8, device=device),
        scoring="softmax",
    )
    return Rig(
        rank=rank,
        topology=Topology(
            num_layers=1, num_experts=num_experts, num_ranks=num_ranks, topk=sizes.topk
        ),
        buffer=make_buffer(device, sizes.hidden, num_ranks),
        exchange=exchange_for(
            dist.group.WORLD, num_layers=1, num_experts=num_experts, device=device, one_host=True
        ),
        layers=layers,
        lever=DowngradeLever(layers, rank, staging, HostFlags(sizes.num_experts, device)),
        routed=routed,
        policy=Policy(epoch=1, lever=Lever.DOWNGRADE, capacity_factor=1.0),
    )


def layer_ms(rig: Rig, num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds a layer of the slowest rank, off and on in turn, `NUM_LAYERS` layers a round."""
    taken: dict[str, list[float]] = {"off": [], "on": []}
    for index in range(num_rounds):
        for name in ("on", "off") if index % 2 else ("off", "on"):
            dist.barrier()
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            for number in range(NUM_LAYERS):
                rig.run_layer(number, low=name == "on")
            ended.record()
            ended.synchronize()
            ms = torch.tensor([begun.elapsed_time(ended) / NUM_LAYERS], device="cuda")
            dist.all_reduce(ms, op=dist.ReduceOp.MAX)
            taken[name].append(ms.item())
    return taken


def record(rig: Rig, path: Path) -> None:
    """A trace of `NUM_LAYERS` layers under the lever, device work only."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(NUM_LAYERS):
            rig.run_layer(number, low=True)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


def main() -> None:
    """Warm up, time, record; rank 0 is the hot one and draws."""
    parser = argparse.ArgumentParser(description="Profile MoE layers under the lever downgrade.")
    parser.add_argument("--out", type=Path, required=True, help="folder for traces and the picture")
    parser.add_argument("--num-tokens", type=int, default=16_384, help="tokens of each rank")
    parser.add_argument("--skew", type=float, default=1.75)
    parser.add_argument("--num-rounds", type=int, default=20)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    args.out.mkdir(parents=True, exist_ok=True)
    rig = make_rig(args.num_tokens, args.skew)
    layer_ms(rig, 3)
    times = layer_ms(rig, args.num_rounds)
    path = args.out / f"trace-rank{rig.rank}.json.gz"
    record(rig, path)
    if rig.rank == HOT:
        told = rig.lever.told()
        view = layer_view(work_of(load(path)), None)
        gpus = f"{dist.get_world_size()} x {torch.cuda.get_device_name()}"
        title = f"{gpus}, {args.num_tokens} tokens a rank, skew {args.skew:g}, the hot rank"
        (args.out / "layer.png").write_bytes(render(LIGHT, 2.9, lambda f: draw(f, view, title)))
        row = {"op": "record_layer", "device": torch.cuda.get_device_name(),
               "num_ranks": dist.get_world_size(), "num_tokens": args.num_tokens,
               "skew": args.skew, "conversion_us": view.conversion_us,
               "hidden_us": view.hidden_us, "exposed_us": view.exposed_us,
               "layer_ms": {name: result_rows.deciles(ms) for name, ms in times.items()},
               **told}  # fmt: skip
        (args.out / "layer.jsonl").write_text(json.dumps(row) + "\n")
        print(view.told(), json.dumps(row), sep="\n", flush=True)
        if not told["num_low_layers"]:
            raise SystemExit("no layer was lowered")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
