"""On 2 or more GPUs: experts stored by a placement, and ids mapped to copies; ends with an error.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_resident.py [--format mxfp4]

No server. Each rank stores a layer of 128 experts as a made-up placement says: all copies must hold
the bytes that its home converts, and the bfloat16 memory of low experts must be free afterwards.
`choose_copy` must equal its reference, alone and replayed in a CUDA graph, and is timed in one.
Under a minute.

Shape letters: T tokens, K top-k, E experts, C most copies.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout

from benchmarks.gpu.shared_gpus import local_device
from sglang_moelb.controller.split import MOST_SHARED, UNITS, bounds_of
from sglang_moelb.ep.resident.formats import FORMATS, NAMES, StoredFormat
from sglang_moelb.ep.resident.weights import WEIGHTS, high_bytes, store
from sglang_moelb.kernels.choose_copy import choose_copy, ref
from sglang_moelb.placement import LayerLayout, LayerPlacement, Replica, layout
from sglang_moelb.types import Topology

NUM_EXPERTS, HIDDEN, INNER, TOPK, NUM_SLOTS = 128, 2048, 768, 8, 4
CALLS_IN_GRAPH = 20


def made_up(num_ranks: int) -> LayerPlacement:
    """Replicas of every rank's first experts on the next rank; its last ones low."""
    per_rank = NUM_EXPERTS // num_ranks
    return LayerPlacement(
        replicas=tuple(
            Replica(expert=rank * per_rank + slot, rank=(rank + 1) % num_ranks)
            for rank in range(num_ranks)
            for slot in range(NUM_SLOTS)
        ),
        low_experts=tuple(
            (rank + 1) * per_rank - 1 - at
            for rank in range(num_ranks)
            for at in range(NUM_SLOTS + 1)
        ),
    )


def make_layer(rank: int, num_ranks: int) -> Any:
    """This rank's experts; any rank can draw any other's."""
    layer = torch.nn.Module()
    generator = torch.Generator("cuda").manual_seed(rank)
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    for name, shape in zip(WEIGHTS, shapes, strict=True):
        size = (NUM_EXPERTS // num_ranks, *shape)
        drawn = 0.02 * torch.randn(size, generator=generator, device="cuda")
        layer.register_parameter(name, torch.nn.Parameter(drawn.bfloat16(), requires_grad=False))
    return layer


def check_store(place: LayerLayout, low_format: StoredFormat, rank: int, num_ranks: int) -> None:
    """All bytes, and all memory."""
    layer = make_layer(rank, num_ranks)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, before_bytes = torch.cuda.memory_allocated(), high_bytes([layer])
    stored = store(layer, place, rank=rank, group=dist.group.WORLD, low_format=low_format)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    assert stored.low is not None
    after_bytes = high_bytes([layer]) + stored.low.num_bytes
    print(f"rank {rank}: experts {before_bytes} bytes before, {after_bytes} after; "
          f"allocator {held:+d}")  # fmt: skip
    if after_bytes > before_bytes or abs(held - (after_bytes - before_bytes)) > 1 << 20:
        raise SystemExit("the memory is not what the placement says")
    per_rank = NUM_EXPERTS // num_ranks
    for at, expert in enumerate(place.low[rank] + place.replicas[rank]):
        home = make_layer(expert // per_rank, num_ranks)
        pick = slice(expert % per_rank, expert % per_rank + 1)
        one = SimpleNamespace(**{name: getattr(home, name)[pick] for name in WEIGHTS})
        wanted = low_format.allocate(one)
        low_format.convert(one, wanted, torch.ones(1, dtype=torch.int32, device="cuda"))
        for name in NAMES:
            got, want = getattr(stored.low, name)[at], getattr(wanted, name)[0]
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                raise SystemExit(f"rank {rank}: {name} of expert {expert} is not its home's")
    own = make_layer(rank, num_ranks)
    chosen = [expert - rank * per_rank for expert in place.high[rank]]
    for name in WEIGHTS:
        if not torch.equal(getattr(layer, name), getattr(own, name)[chosen]):
            raise SystemExit(f"rank {rank}: {name} of a high expert has changed")
    print(f"rank {rank}: {stored.num_low} low and {stored.num_high} high experts hold their bytes")


def check_choice(place: LayerLayout, rank: int) -> None:
    """Equal to the reference, in a graph too; and its time."""
    copies_EC = torch.tensor(place.copies_EC, dtype=torch.int32, device="cuda")
    num_copies_E = torch.tensor(place.num_copies_E, dtype=torch.int32, device="cuda")
    bounds_EB = torch.zeros(NUM_EXPERTS, MOST_SHARED - 1, dtype=torch.int32, device="cuda")
    shared = torch.nonzero(num_copies_E == 2).flatten()[::2].tolist()
    for expert, share in zip(shared, (20, 63, 1, 40) * len(shared), strict=False):
        bounds_EB[expert] = torch.tensor(bounds_of((share, UNITS - share)))
    print(f"rank {rank}: {len(shared)} experts by shares")
    for num_tokens in (0, 1, 64, 4096, 16384):
        ids_TK = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(TOPK, dim=1).indices
        ids_TK[::7, 1] = -1
        tables = copies_EC, num_copies_E, bounds_EB
        out_TK = choose_copy(ids_TK, *tables, shift=rank)
        if not torch.equal(out_TK, ref.choose_copy(ids_TK, *tables, shift=rank)):
            raise SystemExit(f"choose_copy of {num_tokens} tokens differs from its reference")
        if num_tokens:
            time_us = graph_us(ids_TK, tables, rank)
            print(f"rank {rank}: choose_copy of {num_tokens} tokens {time_us:.1f} us")


def graph_us(ids_TK: torch.Tensor, tables: tuple[torch.Tensor, ...], rank: int) -> float:
    """Median time of a call in a CUDA graph that is replayed on other ids and other shares."""
    bounds_EB = tables[2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS_IN_GRAPH):
            out_TK = choose_copy(ids_TK, *tables, shift=rank)
    ids_TK.copy_(ids_TK.flip(0))
    first_E = bounds_EB[:, 0]
    bounds_EB[:, 0] = torch.where(first_E > 0, UNITS - first_E, 0)
    times_us = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(1000 * start.elapsed_time(end) / CALLS_IN_GRAPH)
    if not torch.equal(out_TK, ref.choose_copy(ids_TK, *tables, shift=rank)):
        raise SystemExit("choose_copy in a graph differs from its reference")
    return float(statistics.median(times_us))


def main() -> None:
    """Run both checks on this rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", choices=tuple(FORMATS), default="fp8")
    low_format = FORMATS[parser.parse_args().format]
    torch.cuda.set_device(local_device())
    dist.init_process_group("nccl")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    topology = Topology(num_layers=1, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK)
    place = layout(made_up(num_ranks), topology, NUM_SLOTS)
    check_store(place, low_format, rank, num_ranks)
    check_choice(place, rank)
    dist.barrier()
    if rank == 0:
        print("ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
