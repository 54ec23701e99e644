"""What a MoE layer under the lever replicate pays for, part by part, with DeepEP on one host.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.gpu.bench_replica_layer --out rows.jsonl

The shapes of Qwen3-30B-A3B, 16,384 tokens a rank; one rank gets `--skew` times the mean rows.
Layers are timed in six forms that take away one part after the other, so that their differences
name where the time goes. All forms run in every round, in an order reversed every second round:

    stock          skewed ids as they are
    replicate      count, exchange, plan, copies, reroute, dispatch, experts with copies, combine
    planned        the same plan, known beforehand: without count, exchange and plan
    copied         copies are there too: without the transfer
    rerouted       physical ids known too: without the reroute
    balanced       ids of skew 1 over own experts only: without more and smaller groups

A layer's outputs must be alike in all skewed forms. `--device cpu` runs over the stand-in for
DeepEP, to see that it works; give it small sizes.

Shape letters: T tokens of a rank, K top-k, R ranks, S slots of a rank, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from benchmarks.gpu import result_rows
from benchmarks.gpu.one_layer import LayerSizes, make_layer, now_s
from benchmarks.gpu.sent_rows import combine, dispatch, make_buffer
from benchmarks.gpu.shared_gpus import local_device
from benchmarks.gpu.skew_plugin import skewed_ids
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import exchange_for
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.replicas.lever import DISPATCH_DTYPE, ReplicateLever
from sglang_moelb.ep.replicas.memory import LayerExperts, map_experts
from sglang_moelb.ep.replicas.plan import CopyPlan, plan_copies
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.types import Lever, Policy, Topology

NUM_LAYERS, HOT = 4, 0
FORMS = ("stock", "replicate", "planned", "copied", "rerouted", "balanced")
TOLERANCE = 0.02  # of a layer's output, by which ranks' sums in another order may differ


class Dispatcher:
    """What the lever takes of SGLang's dispatcher, over DeepEP's `Buffer`."""

    def __init__(self, buffer: Any, num_experts: int) -> None:
        self.buffer = buffer
        self.num_experts = num_experts

    def _get_impl(self) -> Dispatcher:
        return self

    def _get_buffer(self) -> Any:
        return self.buffer

    def dispatch(self, routed: LayerInput, ids_TK: torch.Tensor) -> tuple[Any, Any]:
        """Send over as many experts as the lever has said."""
        return dispatch(self.buffer, routed, ids_TK, self.num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """What a rank needs for its layers."""

    rank: int
    topology: Topology
    num_slots: int
    exchange: Any
    dispatcher: Dispatcher
    layers: list[Any]
    experts_L: list[LayerExperts]
    lever: ReplicateLever
    skewed: LayerInput
    even: LayerInput
    policy: Policy

    def plan(self) -> CopyPlan:
        """Count, exchange and plan; collective."""
        return plan_copies(
            self.skewed, self.policy, self.topology, self.exchange, num_slots=self.num_slots
        )

    def physical(self, plan: CopyPlan) -> torch.Tensor:
        """The ids that the lever would dispatch by."""
        return reroute(
            self.skewed.ids_TK, plan.counts_RW, plan.slots_RS, plan.quota_ER, my_rank=self.rank,
            dtype=DISPATCH_DTYPE,
        )  # fmt: skip

    def run_own(self, number: int, routed: LayerInput) -> torch.Tensor:
        """A layer without the lever."""
        layer = self.layers[number]
        rows, handle = self.dispatcher.dispatch(routed, routed.ids_TK)
        return combine(self.dispatcher.buffer, layer.quant_method.apply(layer, rows), handle)

    def run_lever(self, number: int, plan: CopyPlan) -> torch.Tensor:
        """A layer with the lever from a plan on."""
        layer = self.layers[number]
        ids_TK = self.lever.prepare(number, self.dispatcher, plan, self.skewed.ids_TK)
        rows, handle = self.dispatcher.dispatch(self.skewed, ids_TK)
        out = self.lever.run(layer, rows)
        assert out is not None, "the layer was prepared"
        return combine(self.dispatcher.buffer, out, handle)

    def run_wide(self, number: int, ids_TK: torch.Tensor) -> torch.Tensor:
        """A layer over own experts and slots as they are, by physical ids."""
        experts = self.experts_L[number]
        wide = SimpleNamespace(w13_weight=experts.w13, w2_weight=experts.w2)
        self.dispatcher.num_experts = self.topology.num_ranks * len(experts.w13)
        rows, handle = self.dispatcher.dispatch(self.skewed, ids_TK)
        self.dispatcher.num_experts = self.topology.num_experts
        out = self.layers[number].quant_method.apply(wide, rows)
        return combine(self.dispatcher.buffer, out, handle)

    def run(self, form: str, number: int, plan: CopyPlan, ids_TK: torch.Tensor) -> torch.Tensor:
        """One layer in one of `FORMS`; `plan` and its `ids_TK` are those of the skewed ids."""
        if form in ("stock", "balanced"):
            return self.run_own(number, self.skewed if form == "stock" else self.even)
        if form == "replicate":
            return self.run_lever(number, self.plan())
        if form == "planned":
            return self.run_lever(number, plan)
        return self.run_wide(number, self.physical(plan) if form == "copied" else ids_TK)


def make_rig(args: argparse.Namespace, device: torch.device) -> Rig:
    """Layers, buffers and routings of this rank; collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    sizes = LayerSizes(num_experts=args.experts // num_ranks, hidden=args.hidden, inner=args.inner)
    layers = [make_layer(10 * rank + number, sizes, device) for number in range(NUM_LAYERS)]
    group = dist.new_group(backend="gloo")
    experts_L = map_experts(layers, num_slots=args.slots, rank=rank, group=group)
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=args.experts, num_ranks=num_ranks, topk=sizes.topk
    )
    ids_TK = drawn_ids(args.skew, args.num_tokens, device, args.experts, num_hot=args.hot_experts)
    weights_TK = torch.rand(args.num_tokens, sizes.topk, device=device)
    skewed = LayerInput(
        layer=0,
        ids_TK=ids_TK,
        weights_TK=weights_TK / weights_TK.sum(dim=1, keepdim=True),
        logits_TE=torch.empty(0, device=device),
        hidden_TD=torch.randn(args.num_tokens, sizes.hidden, device=device).bfloat16(),
        flags_T=torch.zeros(args.num_tokens, dtype=torch.uint8, device=device),
        scoring="softmax",
    )
    return Rig(
        rank=rank,
        topology=topology,
        num_slots=args.slots,
        exchange=exchange_for(
            dist.group.WORLD, num_layers=1, num_experts=args.experts, device=device, one_host=True
        ),
        dispatcher=Dispatcher(make_buffer(device, sizes.hidden, num_ranks), args.experts),
        layers=layers,
        experts_L=experts_L,
        lever=ReplicateLever(
            layers, experts_L, topology=topology, rank=rank, lanes=lanes_of(device)
        ),
        skewed=skewed,
        even=replace(skewed, ids_TK=drawn_ids(1.0, args.num_tokens, device, args.experts)),
        policy=Policy(epoch=1, lever=Lever.REPLICATE),
    )


def drawn_ids(
    skew: float, num_tokens: int, device: torch.device, num_experts: int, *, hot: int = HOT,
    num_hot: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Of this rank's tokens, int64 `[T, K]`; `num_hot` experts of rank `hot` are hot, 0 for all."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    first = hot * num_experts // num_ranks if num_hot else None
    ids = skewed_ids(
        skew, hot, num_ranks, num_experts, LayerSizes().topk, device.index, first, num_hot
    )
    return ids[rank * num_tokens : (rank + 1) * num_tokens].contiguous()


def balance_of(plan: CopyPlan) -> float:
    """Rows of the busiest rank over the mean, as planned."""
    rows_R = plan.quota_ER.sum(dim=0).float()
    return (rows_R.max() / rows_R.mean()).item()


def check_alike(rig: Rig, plan: CopyPlan, ids_TK: torch.Tensor) -> float:
    """The farthest that a form's output is from stock's, relative; AssertionError if too far.

    A layer of the form `replicate` runs before those that take the copies as they are.
    """
    whole = rig.run("stock", 1, plan, ids_TK).float()
    farthest = 0.0
    for form in FORMS[1:-1]:
        out = rig.run(form, 1, plan, ids_TK).float()
        farthest = max(farthest, ((out - whole).norm() / whole.norm()).item())
        assert farthest < TOLERANCE, f"{form} is {farthest} from stock"
    return farthest


def times_ms(
    rig: Rig, plan: CopyPlan, ids_TK: torch.Tensor, num_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a layer of the slowest rank, by form: `NUM_LAYERS` layers a round."""
    device = rig.skewed.ids_TK.device
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    for index in range(num_rounds):
        for form in FORMS if index % 2 == 0 else FORMS[::-1]:
            dist.barrier()
            begun_s = now_s(device)
            for number in range(NUM_LAYERS):
                rig.run(form, number, plan, ids_TK)
            ms = torch.tensor([1e3 * (now_s(device) - begun_s) / NUM_LAYERS], device=device)
            dist.all_reduce(ms, op=dist.ReduceOp.MAX)
            taken[form].append(ms.item())
    return taken


def differences(taken: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of what each form leaves out against the one before, over the rounds."""
    pairs = pairwise(FORMS[1:])
    parts = ("count, exchange, plan", "copies not hidden", "reroute", "more and smaller groups")
    return {
        part: statistics.median(a - b for a, b in zip(taken[one], taken[less], strict=True))
        for part, (one, less) in zip(parts, pairs, strict=True)
    }


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """The command line, with the group up and this rank's device taken."""
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-tokens", type=int, default=16_384, help="tokens of each rank")
    parser.add_argument("--skew", type=float, default=2.0, help="rows of the hot rank, of the mean")
    parser.add_argument("--hot-experts", type=int, default=0, help="of that rank; 0: all of it")
    parser.add_argument("--slots", type=int, default=32, help="slots of a rank")
    parser.add_argument("--experts", type=int, default=128, help="of all ranks")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--num-rounds", type=int, default=30)
    parser.add_argument("--commit", default="", help="of sglang_moelb, kept in the row")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = local_device()
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    return args, device


def main() -> None:
    """Check, warm up, time; rank 0 appends a row and prints."""
    args, device = begin(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]))
    rig = make_rig(args, device)
    plan = rig.plan()
    ids_TK = rig.physical(plan)
    farthest = check_alike(rig, plan, ids_TK)
    times_ms(rig, plan, ids_TK, 2)
    taken = times_ms(rig, plan, ids_TK, args.num_rounds)
    if rig.rank == 0:
        row = {
            "op": "bench_replica_layer",
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "num_ranks": rig.topology.num_ranks, "num_experts": args.experts,
            "num_tokens": args.num_tokens, "skew": args.skew, "hot_experts": args.hot_experts,
            "num_slots": args.slots, "commit": args.commit, "output_apart": farthest,
            "balance_planned": balance_of(plan),
            "copies_R": (plan.slots_RS >= 0).sum(dim=1).tolist(),
            "layer_ms": {form: result_rows.deciles(ms) for form, ms in taken.items()},
            "parts_ms": differences(taken),
        }  # fmt: skip
        result_rows.append([row], args.out)
        print(json.dumps(row, indent=1), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
