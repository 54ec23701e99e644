"""Device time that our pipeline adds to one MoE layer, all ranks in step (torchrun, NCCL).

    torchrun --nproc-per-node 4 -m benchmarks.gpu.bench_layer --out rows.json

For each size, lever and skew: observe + exchange + plan + apply of `LayerBalancer`, of `plan_low`,
or of `plan_copies` and the reroute (8 slots, without the copies, which run beside the dispatch), or
without a lever the 48 layers of `observe` at once, timed by events round `--inner` calls back to
back, median and 10th and 90th percentile over `--outer`, of the slowest rank, per layer. Also
checks the capacity law on the real exchange.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.skew_plugin import skewed_ids
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.balance import LayerBalancer, LayerInput, group_capacity
from sglang_moelb.ep.exchange import Exchange, SymmetricExchange, exchange_for
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.observe import observe
from sglang_moelb.ep.replicas.plan import plan_copies
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.types import Level, Lever, Policy, Topology

NUM_LAYERS, NUM_EXPERTS, TOPK, HIDDEN = 48, 128, 8, 2048
NUM_SLOTS = 8


def layer_input(num_tokens: int, skew: float, rank: int, num_ranks: int) -> LayerInput:
    """Random weights and logits, skewed ids, half of the tokens vision."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(rank)
    ids = skewed_ids(skew, 1 % num_ranks, num_ranks, NUM_EXPERTS, TOPK, device.index)
    start = rank * num_tokens
    weights = torch.rand(num_tokens, TOPK, generator=generator, device=device)
    return LayerInput(
        layer=0,
        ids_TK=ids[start : start + num_tokens].contiguous(),
        weights_TK=weights / weights.sum(dim=1, keepdim=True),
        logits_TE=torch.randn(num_tokens, NUM_EXPERTS, generator=generator, device=device),
        hidden_TD=torch.empty(num_tokens, HIDDEN, device=device, dtype=torch.bfloat16),
        flags_T=(torch.rand(num_tokens, generator=generator, device=device) < 0.5).to(torch.uint8),
        scoring="softmax",
    )


def agreed_on(policy: Policy, num_tokens: int, num_ranks: int) -> Agreed:
    """Every rank prefills `num_tokens`."""
    sizes = Sizes(num_tokens=num_tokens, num_prefill_tokens=num_tokens, phase="prefill")
    return Agreed(policy=policy, sizes_R=(sizes,) * num_ranks)


def time_us(call: Callable[[], object], outer: int, inner: int) -> tuple[float, float, float]:
    """Median, p10 and p90 microseconds a call, of the slowest rank."""
    samples = []
    for repeat in range(outer + 3):
        dist.barrier()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(inner):
            call()
        ended.record()
        ended.synchronize()
        slowest = torch.tensor([begun.elapsed_time(ended) * 1e3 / inner], device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= 3:
            samples.append(slowest.item())
    deciles = statistics.quantiles(samples, n=10)
    return statistics.median(samples), deciles[0], deciles[8]


def check_capacity(balancer: LayerBalancer, routed: LayerInput, agreed: Agreed,
                   topology: Topology, rank: int) -> bool:  # fmt: skip
    """After drop, every rank's rows are exactly min(rows, capacity)."""
    before = _rank_rows(routed.ids_TK, topology)
    after = _rank_rows(balancer.run(routed, agreed, Lever.DROP).ids_TC, topology)
    capacity = group_capacity(topology, agreed, rank)
    return bool((after == before.clamp(max=capacity)).all())


def _rank_rows(ids: torch.Tensor, topology: Topology) -> torch.Tensor:
    kept = ids[ids >= 0].long() // topology.experts_per_rank
    rows = torch.bincount(kept, minlength=topology.num_ranks)
    dist.all_reduce(rows)
    return rows


def replicate(
    routed: LayerInput,
    policy: Policy,
    topology: Topology,
    exchange: Exchange | SymmetricExchange,
    rank: int,
) -> torch.Tensor:
    """What stands before the dispatch under the lever replicate."""
    plan = plan_copies(routed, policy, topology, exchange, num_slots=NUM_SLOTS)
    return reroute(
        routed.ids_TK, plan.counts_RW, plan.slots_RS, plan.quota_ER, my_rank=rank
    )


def main() -> None:
    """Run all cases; rank 0 writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--outer", type=int, default=20)
    parser.add_argument("--inner", type=int, default=20)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    topology = Topology(num_layers=1, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK)
    device = torch.device("cuda", torch.cuda.current_device())
    exchanges = {
        "symmetric": exchange_for(
            dist.group.WORLD,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            device=device,
            one_host=True,
        ),
        "collective": Exchange(dist.group.WORLD),
    }
    rows: list[dict[str, Any]] = []
    for name, exchange in exchanges.items():
        rows += [row | {"exchange": name} for row in measure(exchange, topology, rank, args)]
    if rank == 0:
        args.out.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


def measure(
    exchange: Exchange | SymmetricExchange, topology: Topology, rank: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All sizes, skews and levers with one exchange."""
    balancer = LayerBalancer(topology, rank, exchange)
    num_ranks = topology.num_ranks
    rows: list[dict[str, Any]] = []
    for num_tokens in (1024, 4096, 16384):
        for skew in (1.0, 2.0, 3.0):
            routed = layer_input(num_tokens, skew, rank, num_ranks)
            for lever in Lever:
                policy = Policy(epoch=1, lever=lever, level=Level.DEVICE, capacity_factor=1.0)
                agreed = agreed_on(policy, num_tokens, num_ranks)
                holds = lever is not Lever.DROP or check_capacity(
                    balancer, routed, agreed, topology, rank
                )
                call, num_layers = partial(balancer.run, routed, agreed, lever), 1
                if lever is Lever.DOWNGRADE:
                    call = partial(plan_low, routed, policy, topology, exchange)
                if lever is Lever.REPLICATE:
                    call = partial(replicate, routed, policy, topology, exchange, rank)
                if lever is Lever.NONE:
                    ids_L, num_layers = [routed.ids_TK] * NUM_LAYERS, NUM_LAYERS
                    call = partial(
                        observe, ids_L, routed.flags_T, exchange, num_experts=NUM_EXPERTS
                    )
                median, low, high = (
                    us / num_layers for us in time_us(call, args.outer, args.inner)
                )
                rows.append({"tokens_per_rank": num_tokens, "skew": skew, "lever": lever.name,
                             "median_us": median, "p10_us": low, "p90_us": high,
                             "capacity_holds": holds})  # fmt: skip
                if rank == 0:
                    print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
