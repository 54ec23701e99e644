"""On 2 or more GPUs: replicas move between passes; ends with an error.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_moves.py [--format mxfp4]

No server. Four layers of 32 experts on each rank, 9.4 MB each in fp8, two slots a rank and layer.
Each pass runs the agreement, the part of a move, and matrix products as the rest of a pass.
Afterwards every slot must hold the bytes that a fresh start with the last placement stores there,
and the maps must be that start's. Printed: the stall of a pass on the device (events around the
agreement's end, of the fastest rank, passes with a part of a move), its median, 99th percentile and
most, beside the host time; the same of passes without a move; passes and time that a move takes.
Under a minute.

Shape letters: L MoE layers, E experts, C copies.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout

from benchmarks.gpu.shared_gpus import local_device
from sglang_moelb.controller.moves import Move
from sglang_moelb.ep.agreed import Sizes
from sglang_moelb.ep.exchange import Agreement
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.formats import FORMATS, NAMES
from sglang_moelb.ep.resident.move import Mover
from sglang_moelb.ep.resident.moving import MovingAgreement
from sglang_moelb.ep.resident.weights import WEIGHTS, store
from sglang_moelb.placement import LayerPlacement, Replica, layout
from sglang_moelb.types import Policy, Topology

NUM_LAYERS, PER_RANK, HIDDEN, INNER, NUM_SLOTS = 4, 32, 4096, 768, 2  # 9.4 MB an expert in fp8
MOVE_MS, MOST_PASSES, NUM_STILL = 1.0, 400, 100


def make_layer(seed: int) -> Any:
    """This rank's experts."""
    layer = torch.nn.Module()
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, shape in zip(WEIGHTS, ((2 * INNER, HIDDEN), (HIDDEN, INNER)), strict=True):
        drawn = 0.02 * torch.randn((PER_RANK, *shape), generator=generator, device="cuda")
        layer.register_parameter(name, torch.nn.Parameter(drawn.bfloat16(), requires_grad=False))
    return layer


def placed(num_ranks: int, shift: int) -> LayerPlacement:
    """Each rank holds replicas of the next one's experts; the last of every rank are low."""
    copies = [
        Replica(expert=(rank + 1) % num_ranks * PER_RANK + shift + slot, rank=rank)
        for rank in range(num_ranks)
        for slot in range(NUM_SLOTS)
    ]
    low = [
        (rank + 1) * PER_RANK - 1 - at for rank in range(num_ranks) for at in range(NUM_SLOTS + 1)
    ]
    return LayerPlacement(replicas=tuple(copies), low_experts=tuple(sorted(low)))


class Passes:
    """The passes of a rank, timed."""

    def __init__(self, agreement: MovingAgreement) -> None:
        self._agreement = agreement
        self._load = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.events: list[tuple[Any, Any]] = []
        self.host_ms: list[float] = []

    def run(self, word: int) -> None:
        """One pass."""
        sizes = Sizes(num_tokens=1, num_prefill_tokens=1, phase="prefill")
        self._agreement.start(Policy(epoch=1, move=word, move_ms=MOVE_MS), sizes)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        start_s = time.perf_counter()
        self._agreement.finish()
        self.host_ms.append(1e3 * (time.perf_counter() - start_s))
        ended.record()
        self.events.append((begun, ended))
        for _ in range(20):  # about 4 ms
            self._load = (self._load @ self._load).clamp(-1, 1)

    def report(self, rank: int, what: str) -> None:
        """Print the stalls since the last report; collective."""
        torch.cuda.synchronize()
        mine = torch.tensor([a.elapsed_time(b) for a, b in self.events], device="cuda")
        dist.all_reduce(mine, op=dist.ReduceOp.MIN)  # who comes first waits
        took_ms, host_ms = sorted(mine.tolist()), sorted(self.host_ms)
        self.events, self.host_ms = [], []
        if rank == 0:
            for name, times in (("device", took_ms), ("host of rank 0", host_ms)):
                print(f"{what}, {len(times)} passes, {name}: median "
                      f"{statistics.median(times):.3f} ms, 99 % {times[-1 - len(times) // 100]:.3f}"
                      f", most {times[-1]:.3f}")  # fmt: skip


def check_bytes(stored_L: list[Any], fresh_L: list[Any], rank: int) -> None:
    """All low places of all layers."""
    for number, (stored, fresh) in enumerate(zip(stored_L, fresh_L, strict=True)):
        for name in NAMES:
            got, want = getattr(stored.low, name), getattr(fresh.low, name)
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                raise SystemExit(f"rank {rank}: {name} of layer {number} is not a fresh start's")


def note_stall(stalls: dict[str, list[float]], before: Any, after: Any) -> None:
    """Add what the mover counted in a pass to the part that was under way before it."""
    stall_ms = after["stall_ms"] - before["stall_ms"]
    if before["pending"] and stall_ms > 0:
        stalls.setdefault(before["pending"]["part"], []).append(stall_ms)


def main() -> None:
    """Move all slots of all layers, and compare with a start that has them so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", choices=tuple(FORMATS), default="fp8")
    low_format = FORMATS[parser.parse_args().format]
    torch.cuda.set_device(local_device())
    dist.init_process_group("nccl")
    hosts = dist.new_group(backend="gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=PER_RANK * num_ranks, num_ranks=num_ranks, topk=8
    )
    group = dist.group.WORLD
    assert group is not None

    def make(shift: int) -> tuple[list[Any], list[Any], list[Any], ResidentExperts]:
        layers = [make_layer(100 * rank + number) for number in range(NUM_LAYERS)]
        place = layout(placed(num_ranks, shift), topology, NUM_SLOTS)
        stored = [
            store(layer, place, rank=rank, group=group, low_format=low_format) for layer in layers
        ]
        width = num_ranks - place.copies_EC.shape[1]
        wide = np.pad(place.copies_EC, ((0, 0), (0, width)), constant_values=-1)
        layouts = [replace(place, copies_EC=wide)] * NUM_LAYERS
        return layers, stored, layouts, ResidentExperts(layers, stored, layouts, rank=rank)

    first, last = 0, NUM_SLOTS + 1
    layers, stored_L, layouts_L, copies = make(first)
    placed_L = [placed(num_ranks, first)] * NUM_LAYERS
    mover = Mover(layers, stored_L, layouts_L, placed_L, copies, topology, rank, group)
    passes = Passes(MovingAgreement(Agreement(hosts, one_host=True), mover, copies))
    for _ in range(NUM_STILL):
        passes.run(0)
    passes.report(rank, "no move")
    wanted = [
        Move(number=0, layer=layer, rank=copy.rank, slot=at % NUM_SLOTS, expert=copy.expert)
        for layer in range(NUM_LAYERS)
        for at, copy in enumerate(placed(num_ranks, last).replicas)
    ]
    stalls: dict[str, list[float]] = {}
    start_s = time.perf_counter()
    for number, one in enumerate(wanted, start=1):
        word = replace(one, number=number).word()
        for _ in range(MOST_PASSES):
            before = mover.told()
            passes.run(word)
            note_stall(stalls, before, mover.told())
            if mover.moved.word == word:
                break
        else:
            raise SystemExit(f"a move did not end: {mover.told()}")
    torch.cuda.synchronize()
    took_s, num_passes = time.perf_counter() - start_s, len(passes.events)
    passes.report(rank, "moving")
    told, num_moves = mover.told(), len(wanted)
    if (told["num_done"], told["num_failed"]) != (num_moves, 0):
        raise SystemExit(f"rank {rank}: {told}")
    _, fresh_L, _, fresh = make(last)
    check_bytes(stored_L, fresh_L, rank)
    for number in range(NUM_LAYERS):
        for mine, theirs in ((copies._copies_L, fresh._copies_L),
                             (copies._num_copies_L, fresh._num_copies_L)):  # fmt: skip
            if not torch.equal(mine[number], theirs[number]):
                raise SystemExit(f"rank {rank}: the map of layer {number} is not a fresh start's")
    dist.barrier()
    if rank == 0:
        print(f"{num_moves} moves of {mover.num_bytes / 1e6:.1f} MB: {num_passes / num_moves:.1f} "
              f"passes and {1e3 * took_s / num_moves:.1f} ms each; last chunk "
              f"{told['chunk_bytes'] / 1e6:.2f} MB; told stalls {told['stall_ms']:.1f} ms, most "
              f"{told['max_stall_ms']:.3f} ms, allowed {MOVE_MS} ms")  # fmt: skip
        for part, counted in stalls.items():
            print(f"  {part}: {len(counted)} parts, told stall median "
                  f"{statistics.median(counted):.3f} ms, most {max(counted):.3f}")  # fmt: skip
        print("ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
