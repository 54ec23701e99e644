"""On 2 or more GPUs: `pull_experts` from peers' symmetric memory, checked, then timed.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_pull.py --out rows.jsonl

Every rank's experts (9.4 MB each, as in Qwen3-30B-A3B) lie in symmetric memory; multicast is not
used and is switched off where nobody has done so. The status is 1 if any rank got a wrong byte.
Times are of a call in a CUDA graph of ten, of the slowest rank, and beside it the copy engine.

Shape letters: R ranks, S slots of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # runs from a checkout, nothing installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._symmetric_memory as symm_mem  # noqa: E402
from torch import Tensor  # noqa: E402

from sglang_moelb.kernels.pull_experts import pull_experts  # noqa: E402

NUM_LOCAL, NUM_SLOTS = 16, 8
EXPERT_ELEMENTS = 3 * 2048 * 768
CALLS_IN_GRAPH = 10


def plan(num_ranks: int, pulled: dict[int, int], source: int | None) -> Tensor:
    """Slots int32 [R, S]: each rank of `pulled` gets so many experts of `source` or the next."""
    slots_RS = torch.full((num_ranks, NUM_SLOTS), -1, dtype=torch.int32)
    for rank, num_pulled in pulled.items():
        home = (rank + 1) % num_ranks if source is None else source
        places = (torch.arange(num_pulled) * 5 + rank) % NUM_LOCAL
        slots_RS[rank, torch.arange(num_pulled)] = (home * NUM_LOCAL + places).int()
    return slots_RS


def graph_us(call: Callable[[], object]) -> float:
    """Time of one call among ten of a CUDA graph, median of 20 replays, of the slowest rank."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS_IN_GRAPH):
            call()
    times_us = []
    for _ in range(23):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / CALLS_IN_GRAPH)
    slowest = torch.tensor([statistics.median(times_us[3:])], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def check(experts: list[Tensor], slots_RS: Tensor, staged: Tensor, rank: int) -> None:
    """Pull by the plan and compare every byte; empty slots must be left alone."""
    staged.fill_(-3.0)
    pull_experts(experts, slots_RS.cuda(), staged, my_rank=rank)
    torch.cuda.synchronize()
    for slot, expert in enumerate(slots_RS[rank].tolist()):
        expected = torch.full_like(staged[slot], -3.0)
        if expert >= 0:
            expected = experts[expert // NUM_LOCAL][expert % NUM_LOCAL]
        assert torch.equal(staged[slot], expected), f"rank {rank} slot {slot}: expert {expert}"
    dist.barrier()


def copy_by_engine(experts: list[Tensor], slots_RS: Tensor, staged: Tensor, rank: int) -> None:
    """The same by copies between devices, which need the plan on the host."""
    for slot, expert in enumerate(slots_RS[rank].tolist()):
        if expert >= 0:
            staged[slot].copy_(experts[expert // NUM_LOCAL][expert % NUM_LOCAL])


def main() -> None:
    """Check on all ranks, then time pulls of 1 to 8 experts in both patterns."""
    parser = argparse.ArgumentParser(description="Check and time pull_experts between GPUs.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file of the times")
    args = parser.parse_args()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    size = (NUM_LOCAL, EXPERT_ELEMENTS)
    own = symm_mem.empty(*size, dtype=torch.bfloat16, device=device)
    handle = symm_mem.rendezvous(own, dist.group.WORLD)
    generator = torch.Generator(device).manual_seed(rank)
    own.copy_(torch.randn(size, generator=generator, device=device))
    torch.cuda.synchronize()
    dist.barrier()
    experts = [handle.get_buffer(peer, size, torch.bfloat16) for peer in range(num_ranks)]
    staged = torch.empty(NUM_SLOTS, EXPERT_ELEMENTS, dtype=torch.bfloat16, device="cuda")

    everyone = range(num_ranks)
    patterns = {"all pull from the next": (None, everyone), "others pull from 0": (0, everyone[1:])}
    for source, pulling in patterns.values():
        for num_pulled in (0, 1, 5, NUM_SLOTS):
            check(
                experts, plan(num_ranks, dict.fromkeys(pulling, num_pulled), source), staged, rank
            )
    if rank == 0:
        print("equal byte for byte on all ranks", flush=True)

    rows = []
    for name, (source, pulling) in patterns.items():
        for num_pulled in (0, 1, 2, 4, 8):
            slots_RS = plan(num_ranks, dict.fromkeys(pulling, num_pulled), source)
            on_device = slots_RS.cuda()
            times = {
                f"programs_{n}_us": graph_us(
                    lambda on_device=on_device, n=n: pull_experts(
                        experts, on_device, staged, my_rank=rank, num_programs=n
                    )
                )
                for n in (8, 16, 32, 64)
            }
            if num_pulled:
                times["copy_engine_us"] = graph_us(
                    lambda slots_RS=slots_RS: (
                        copy_by_engine(experts, slots_RS, staged, rank)
                        if (slots_RS[rank] >= 0).any()
                        else staged[0, :8].zero_()
                    )
                )
            rows.append({"pattern": name, "num_ranks": num_ranks, "experts": num_pulled, **times})
            if rank == 0:
                print(rows[-1], flush=True)
    if rank == 0:
        seen = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps({**row, **seen}) + "\n" for row in rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
