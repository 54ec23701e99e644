"""A MoE layer from top-k to combine by SGLang's EPLB, beside `replicate`, with DeepEP on one host.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.gpu.bench_eplb_layer --out rows.jsonl

Load, shapes and timing are those of bench_replica_layer.py; `--hot-experts 8` makes the skew by few
experts. Arms, in an order reversed every second round:

    stock           skewed ids as they are
    eplb            placed by SGLang's own algorithm for this load, its static map of every rank
    eplb_other      the same, placed for the like load with the next rank hot
    replicate       the lever as a server runs it
    balanced        ids of skew 1 over own experts only

EPLB has `--redundant` experts in all; as many as the lever has slots on all ranks is the same
memory, of a layer: the lever's are shared by all layers.

Shape letters: T tokens of a rank, K top-k, E experts, P physical experts of all ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_replica_layer import (
    HOT,
    NUM_LAYERS,
    TOLERANCE,
    Rig,
    begin,
    drawn_ids,
    make_rig,
)
from benchmarks.gpu.one_layer import LayerSizes, arm_times_ms, make_layer
from benchmarks.gpu.sent_rows import combine


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A placement: the same for all layers, with this rank's weights of each."""

    layers: list[Any]
    log2phy_E: torch.Tensor
    num_physical: int
    balance: float


def place(
    rig: Rig, sizes: LayerSizes, history_TK: torch.Tensor, num_redundant: int
) -> Placed:
    """SGLang's placement for the load of `history_TK` of all ranks; collective."""
    from sglang.srt.eplb import expert_location
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts

    num_ranks, device = rig.topology.num_ranks, history_TK.device
    num_physical = rig.topology.num_experts + num_redundant
    own = num_physical // num_ranks
    phy2log_LP, log2all_LEX, _ = rebalance_experts(
        tokens_per_expert=rows_of(history_TK, rig.topology.num_experts)[None, None].cpu(),
        num_physical_experts=num_physical,
        num_local_physical_experts=own,
        num_groups=None,
        num_nodes=1,
        algorithm=EplbAlgorithm.deepseek,
    )
    # SGLang asks a server's configuration, which there is none of; one node leaves it no choice.
    with mock.patch.object(expert_location, "_prefer_same_node_experts", return_value=False):
        log2phy_E = expert_location.compute_logical_to_rank_dispatch_physical_map(
            log2all_LEX, num_ranks, num_physical, rig.rank
        )[0].to(device)
    mine = phy2log_LP[0, rig.rank * own : (rig.rank + 1) * own].tolist()
    rows_P = torch.zeros(num_physical, device=device)
    rows_P += torch.bincount(log2phy_E[rig.skewed.ids_TK].flatten(), minlength=num_physical)
    dist.all_reduce(rows_P)
    rows_R = rows_P.view(num_ranks, own).sum(dim=1)
    return Placed(
        layers=[gathered(number, mine, sizes, num_ranks, device) for number in range(NUM_LAYERS)],
        log2phy_E=log2phy_E,
        num_physical=num_physical,
        balance=(rows_R.max() / rows_R.mean()).item(),
    )


def rows_of(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows of every logical expert over all ranks, float32 `[E]`; collective."""
    rows_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).float()
    dist.all_reduce(rows_E)
    return rows_E


def gathered(
    number: int, experts: list[int], sizes: LayerSizes, num_ranks: int, device: torch.device
) -> Any:
    """Weights of the logical `experts`, drawn again as their home ranks have drawn them."""
    homes = [make_layer(10 * rank + number, sizes, device) for rank in range(num_ranks)]
    weights = {}
    for name in ("w13_weight", "w2_weight"):
        weights[name] = torch.stack([
            getattr(homes[expert // sizes.num_experts], name)[expert % sizes.num_experts]
            for expert in experts
        ])  # fmt: skip
    return SimpleNamespace(**weights)


def run_placed(rig: Rig, placed: Placed, number: int) -> torch.Tensor:
    """A layer by physical ids of a placement; finding them is counted, as SGLang does it too."""
    ids_TK = placed.log2phy_E[rig.skewed.ids_TK]
    rig.dispatcher.num_experts = placed.num_physical
    rows, handle = rig.dispatcher.dispatch(rig.skewed, ids_TK)
    rig.dispatcher.num_experts = rig.topology.num_experts
    out = rig.layers[number].quant_method.apply(placed.layers[number], rows)
    return combine(rig.dispatcher.buffer, out, handle)


def main() -> None:
    """Place, check, warm up, time; rank 0 appends a row and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--redundant", type=int, default=64, help="experts of EPLB, of all ranks")
    args, device = begin(parser)
    rig = make_rig(args, device)
    num_ranks = rig.topology.num_ranks
    sizes = LayerSizes(num_experts=args.experts // num_ranks, hidden=args.hidden, inner=args.inner)
    other_TK = drawn_ids(
        args.skew, args.num_tokens, device, args.experts, hot=(HOT + 1) % num_ranks,
        num_hot=args.hot_experts,
    )  # fmt: skip
    matching = place(rig, sizes, rig.skewed.ids_TK, args.redundant)
    other = place(rig, sizes, other_TK, args.redundant)
    arms: dict[str, Callable[[int], torch.Tensor]] = {
        "stock": lambda number: rig.run_own(number, rig.skewed),
        "eplb": lambda number: run_placed(rig, matching, number),
        "eplb_other": lambda number: run_placed(rig, other, number),
        "replicate": lambda number: rig.run_lever(number, rig.plan()),
        "balanced": lambda number: rig.run_own(number, rig.even),
    }
    whole = arms["stock"](1).float()
    for name in ("eplb", "eplb_other", "replicate"):
        apart = ((arms[name](1).float() - whole).norm() / whole.norm()).item()
        assert apart < TOLERANCE, f"{name} is {apart} from stock"
    arm_times_ms(arms, device, NUM_LAYERS, 2)
    taken = arm_times_ms(arms, device, NUM_LAYERS, args.num_rounds)
    if rig.rank == 0:
        row = {
            "op": "bench_eplb_layer",
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "num_ranks": num_ranks, "num_experts": args.experts,
            "num_tokens": args.num_tokens, "skew": args.skew, "hot_experts": args.hot_experts,
            "num_slots": args.slots, "num_redundant": args.redundant, "commit": args.commit,
            "balance": {"eplb": matching.balance, "eplb_other": other.balance},
            "layer_ms": {name: result_rows.deciles(ms) for name, ms in taken.items()},
        }  # fmt: skip
        result_rows.append([row], args.out)
        print(json.dumps(row, indent=1), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
