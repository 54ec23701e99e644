"""A MoE layer from top-k to combine under the lever downgrade, its bounds beside it, with DeepEP.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.gpu.bench_downgrade_layer --out r.jsonl

The shapes of Qwen3-30B-A3B, 128 experts over the ranks, 16,384 tokens a rank, all vision; one rank
gets `--skew` times the mean rows. Every round times all arms, in an order reversed every second
round, milliseconds a layer of the slowest rank over `NUM_LAYERS` layers:

    stock       skewed ids, all experts in bfloat16
    rank        the lever as it is by default: count, exchange, plan, conversion under the dispatch
    experts     the same, only the experts that need it
    fewest      the same, the fewest experts that bring the rank to the mean
    kept        as rank, with low-precision copies that are kept: conversion for nothing
    fp8         every expert of every rank low, copies kept, no plan: what low precision can give
    balanced    ids of skew 1, all experts in bfloat16

An arm's output must be as near to stock's as float8 rounds. `--device cpu` runs over the stand-in
for DeepEP, to see that it works; give it small sizes.

Shape letters: T tokens of a rank, K top-k, R ranks, E experts, e local ones.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from benchmarks.gpu import result_rows
from benchmarks.gpu.one_layer import LayerSizes, arm_times_ms, make_layer
from benchmarks.gpu.sent_rows import combine, dispatch, make_buffer
from benchmarks.gpu.shared_gpus import local_device
from benchmarks.gpu.skew_plugin import skewed_ids
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import exchange_for
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.lanes import lanes_of
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.kernels.row_layout import FLAG_VISION
from sglang_moelb.types import Form, Lever, Policy, Topology

NUM_LAYERS, HOT = 4, 0
TOLERANCE = 0.12  # of a layer's output; float8 rounds by 6.4 % where all is low


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """What a rank needs for its layers."""

    rank: int
    topology: Topology
    buffer: Any
    exchange: Any
    layers: list[Any]
    staged: DowngradeLever
    kept: DowngradeLever
    every_E: torch.Tensor
    skewed: LayerInput
    even: LayerInput

    def run_own(self, number: int, routed: LayerInput) -> torch.Tensor:
        """A layer in bfloat16."""
        layer = self.layers[number]
        rows, handle = dispatch(self.buffer, routed, routed.ids_TK, self.topology.num_experts)
        return combine(self.buffer, layer.quant_method.apply(layer, rows), handle)

    def run_low(
        self, number: int, lever: DowngradeLever, form: Form | None
    ) -> torch.Tensor:
        """A layer planned in `form`, or with all experts low."""
        low_E, layer = self.every_E, self.layers[number]
        if form is not None:
            policy = Policy(epoch=1, lever=Lever.DOWNGRADE, capacity_factor=1.0, form=form)
            low_E = plan_low(self.skewed, policy, self.topology, self.exchange).low_E
        lever.prepare(number, low_E)
        skewed, num_experts = self.skewed, self.topology.num_experts
        rows, handle = dispatch(self.buffer, skewed, skewed.ids_TK, num_experts)
        out = lever.run(layer, rows)
        if out is None:
            out = layer.quant_method.apply(layer, rows)
        return combine(self.buffer, out, handle)

    def arms(self) -> dict[str, Callable[[int], torch.Tensor]]:
        """A layer in each arm, by its number."""
        return {
            "stock": lambda number: self.run_own(number, self.skewed),
            "rank": lambda number: self.run_low(number, self.staged, Form.RANK),
            "experts": lambda number: self.run_low(number, self.staged, Form.EXPERTS),
            "fewest": lambda number: self.run_low(number, self.staged, Form.FEWEST),
            "kept": lambda number: self.run_low(number, self.kept, Form.RANK),
            "fp8": lambda number: self.run_low(number, self.kept, None),
            "balanced": lambda number: self.run_own(number, self.even),
        }


def make_rig(args: argparse.Namespace, device: torch.device) -> Rig:
    """Layers, buffers and routings of this rank; collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    sizes = LayerSizes(num_experts=args.experts // num_ranks, hidden=args.hidden, inner=args.inner)
    layers = [make_layer(10 * rank + number, sizes, device) for number in range(NUM_LAYERS)]

    def lever_of(num_slots: int, resident: range) -> DowngradeLever:
        staging = Staging(
            layers, num_slots=num_slots, resident=resident, lanes=lanes_of(device)
        )
        return DowngradeLever(layers, rank, staging, HostFlags(sizes.num_experts, device))

    weights_TK = torch.rand(args.num_tokens, sizes.topk, device=device)
    skewed = LayerInput(
        layer=0,
        ids_TK=_ids(args.skew, args.num_tokens, device, args.experts),
        weights_TK=weights_TK / weights_TK.sum(dim=1, keepdim=True),
        logits_TE=torch.empty(0, device=device),
        hidden_TD=torch.randn(args.num_tokens, sizes.hidden, device=device).bfloat16(),
        flags_T=torch.full((args.num_tokens,), FLAG_VISION, dtype=torch.uint8, device=device),
        scoring="softmax",
    )
    return Rig(
        rank=rank,
        topology=Topology(
            num_layers=1, num_experts=args.experts, num_ranks=num_ranks, topk=sizes.topk
        ),
        buffer=make_buffer(device, sizes.hidden, num_ranks),
        exchange=exchange_for(
            dist.group.WORLD, num_layers=1, num_experts=args.experts, device=device, one_host=True
        ),
        layers=layers,
        staged=lever_of(2, range(0)),
        kept=lever_of(0, range(NUM_LAYERS)),
        every_E=torch.ones(args.experts, dtype=torch.int32, device=device),
        skewed=skewed,
        even=replace(skewed, ids_TK=_ids(1.0, args.num_tokens, device, args.experts)),
    )


def _ids(
    skew: float, num_tokens: int, device: torch.device, num_experts: int
) -> torch.Tensor:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    ids = skewed_ids(skew, HOT, num_ranks, num_experts, LayerSizes().topk, device.index)
    return ids[rank * num_tokens : (rank + 1) * num_tokens].contiguous()


def check_alike(rig: Rig, *, is_skewed: bool) -> dict[str, float]:
    """How far each arm is from stock, relative; AssertionError where that is not as planned.

    Balanced, no plan lowers an expert, so that only `fp8` differs.
    """
    arms = rig.arms()
    whole = arms["stock"](1).float()
    apart = {}
    for name in ("rank", "experts", "fewest", "kept", "fp8"):
        out = arms[name](1).float()
        apart[name] = ((out - whole).norm() / whole.norm()).item()
        assert apart[name] < TOLERANCE, f"{name} is {apart[name]} from stock"
        is_low = is_skewed or name == "fp8"
        assert (apart[name] > 0) == is_low, f"{name} is {apart[name]} from stock"
    return apart


def main() -> None:
    """Check, warm up, time; rank 0 appends a row and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-tokens", type=int, default=16_384, help="tokens of each rank")
    parser.add_argument("--skew", type=float, default=2.0, help="rows of the hot rank, of the mean")
    parser.add_argument("--experts", type=int, default=128, help="of all ranks")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--num-rounds", type=int, default=20)
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
    rig = make_rig(args, device)
    apart = check_alike(rig, is_skewed=args.skew > 1.0)
    arm_times_ms(rig.arms(), device, NUM_LAYERS, 2)
    taken = arm_times_ms(rig.arms(), device, NUM_LAYERS, args.num_rounds)
    if rig.rank == 0:
        row = {
            "op": "bench_downgrade_layer",
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "num_ranks": rig.topology.num_ranks, "num_experts": args.experts,
            "num_tokens": args.num_tokens, "skew": args.skew,
            "commit": args.commit, "output_apart": apart,
            "num_host_waits": rig.staged.told()["num_host_waits"],
            "layer_ms": {name: result_rows.deciles(ms) for name, ms in taken.items()},
        }  # fmt: skip
        result_rows.append([row], args.out)
        print(json.dumps(row, indent=1), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
