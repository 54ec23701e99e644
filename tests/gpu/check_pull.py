"""On 2 or more GPUs of a host: experts mapped between ranks and pulled, checked, then timed.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_pull.py --out pull.jsonl

`map_experts` moves three layers of 16 experts a rank (9.4 MB each, as in Qwen3-30B-A3B; then three
of odd sizes), and every rank checks: parameters and what it reads of its peers, byte for byte;
pulls of 0 to 8 experts into slots that all layers see; memory held and at the peak; and DeepGEMM
over own experts and slots in one call against the same weights in ordinary memory, bit for bit.
The exit status is 1 if anything is wrong on any rank. Then times of one pull of both projections,
the slowest rank's, alone in a CUDA graph of ten and beside a matmul. No multicast. Under a minute.

Shape letters: P parts of an expert's weights, R ranks, S slots of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # runs from a checkout

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from sglang_moelb.ep.replicas.memory import LayerExperts, map_experts  # noqa: E402
from sglang_moelb.kernels.pull_experts import pull_experts  # noqa: E402

NUM_LAYERS, NUM_LOCAL, NUM_SLOTS = 3, 16, 8
SHAPES = ((1536, 2048), (2048, 768))
ODD_SHAPES = ((24, 40), (40, 12))  # experts that end on no page, and begin on none
EXPERT_BYTES = 2 * sum(rows * columns for rows, columns in SHAPES)
CALLS_IN_GRAPH = 10
LINK_BYTES_A_S = 380e9  # out of one GPU to its readers: four H100s of one host, copy engines
SLACK_BYTES = 64 << 20  # granules, and what the driver and NCCL take meanwhile
SLEEP_CYCLES = 2_000_000  # about 1 ms
MARK = -3.0


def weights(rank: int, layer: int, shapes: Any = SHAPES) -> list[Tensor]:
    """Both projections of a rank's experts of a layer, the same wherever they are made."""
    generator = torch.Generator("cuda").manual_seed(1000 * rank + layer)
    return [
        (0.02 * torch.randn((NUM_LOCAL, *shape), generator=generator, device="cuda")).bfloat16()
        for shape in shapes
    ]


def make_layer(rank: int, layer: int, shapes: Any) -> Any:
    """A layer's parameters as SGLang holds them, in memory that they share with nothing else."""
    torch.cuda.empty_cache()
    w13, w2 = (
        torch.nn.Parameter(
            torch.empty(NUM_LOCAL, *shape, dtype=torch.bfloat16, device="cuda"),
            requires_grad=False,
        )
        for shape in shapes
    )
    for parameter, value in zip((w13, w2), weights(rank, layer, shapes), strict=True):
        parameter.copy_(value)
    return SimpleNamespace(w13_weight=w13, w2_weight=w2)


class LowestFree:
    """The least free memory of the device while the context lasts, asked for every millisecond."""

    def __enter__(self) -> LowestFree:
        self.bytes, self._ended = torch.cuda.mem_get_info()[0], threading.Event()
        device = torch.cuda.current_device()

        def watch() -> None:
            torch.cuda.set_device(device)
            while not self._ended.is_set():
                self.bytes = min(self.bytes, torch.cuda.mem_get_info()[0])
                time.sleep(0.001)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def map_and_check(rank: int, num_ranks: int, group: Any, shapes: Any) -> list[LayerExperts]:
    """Layers mapped between all ranks, with every byte compared and their memory counted."""
    layers = [make_layer(rank, layer, shapes) for layer in range(NUM_LAYERS)]
    own_bytes = layers[0].w13_weight.nbytes + layers[0].w2_weight.nbytes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    dist.barrier()
    before, begun_s = torch.cuda.mem_get_info()[0], time.monotonic()
    with LowestFree() as lowest:
        experts_of = map_experts(layers, num_slots=NUM_SLOTS, rank=rank, group=group)
    took_s = time.monotonic() - begun_s
    held, peak = before - torch.cuda.mem_get_info()[0], before - lowest.bytes
    if rank == 0:
        print(
            f"{NUM_LAYERS} layers of {own_bytes >> 20} MiB mapped by {num_ranks} ranks in "
            f"{took_s:.2f} s: slots {experts_of[0].slots_bytes >> 20} MiB, memory held "
            f"{held >> 20} MiB more than before, at the peak {peak >> 20}",
            flush=True,
        )
    assert held < experts_of[0].slots_bytes + SLACK_BYTES, "slots are held more than once"
    assert peak < experts_of[0].slots_bytes + own_bytes + SLACK_BYTES, "more than one layer twice"
    for number, (layer, experts) in enumerate(zip(layers, experts_of, strict=True)):
        assert layer.w13_weight.data_ptr() == experts.w13.data_ptr()
        assert layer.w2_weight.data_ptr() == experts.w2.data_ptr()
        for peer in range(num_ranks):
            seen = (experts.w13_R[peer], experts.w2_R[peer])
            for mapped, expected in zip(seen, weights(peer, number, shapes), strict=True):
                assert mapped.device == expected.device
                assert torch.equal(mapped, expected), f"layer {number}, rank {peer}'s experts"
    dist.barrier()
    return experts_of


def plan(num_ranks: int, pulled: dict[int, int], source: int | None) -> Tensor:
    """Slots int32 [R, S]: each rank of `pulled` gets so many experts of `source` or the next."""
    slots_RS = torch.full((num_ranks, NUM_SLOTS), -1, dtype=torch.int32)
    for rank, num_pulled in pulled.items():
        home = (rank + 1) % num_ranks if source is None else source
        places = (torch.arange(num_pulled) * 5 + rank) % NUM_LOCAL
        slots_RS[rank, torch.arange(num_pulled)] = (home * NUM_LOCAL + places).int()
    return slots_RS


def slots_of(experts: LayerExperts) -> tuple[Tensor, Tensor]:
    """The slots of both projections, as this layer sees them."""
    return experts.w13[NUM_LOCAL:], experts.w2[NUM_LOCAL:]


def pull(experts: LayerExperts, slots_RS: Tensor, rank: int, num_programs: int = 16) -> None:
    """Both projections of a layer's experts into the slots."""
    pull_experts(
        (experts.w13_R, experts.w2_R), slots_RS, slots_of(experts),
        my_rank=rank, num_programs=num_programs,
    )  # fmt: skip


def check_pull(experts_of: list[LayerExperts], layer: int, slots_RS: Tensor, rank: int) -> None:
    """Pull for one layer by the plan and compare the slots as all layers see them."""
    for slots in slots_of(experts_of[layer]):
        slots.fill_(MARK)
    pull(experts_of[layer], slots_RS.cuda(), rank)
    torch.cuda.synchronize()
    for reader in experts_of:
        for part, slots in enumerate(slots_of(reader)):
            own_R = (experts_of[layer].w13_R, experts_of[layer].w2_R)[part]
            for slot, expert in enumerate(slots_RS[rank].tolist()):
                expected = torch.full_like(slots[slot], MARK)
                if expert >= 0:
                    expected = own_R[expert // NUM_LOCAL][expert % NUM_LOCAL]
                assert torch.equal(slots[slot], expected), f"layer {layer}, slot {slot}: {expert}"
    for part, own in enumerate((experts_of[layer].w13_R[rank], experts_of[layer].w2_R[rank])):
        shapes = [tuple(w.shape[1:]) for w in (experts_of[0].w13, experts_of[0].w2)]
        assert torch.equal(own, weights(rank, layer, shapes)[part]), "own experts written"
    dist.barrier()


def check_grouped_run(experts: LayerExperts, slots_RS: Tensor, rank: int) -> str:
    """DeepGEMM over own experts and slots at once, against ordinary memory, bit for bit."""
    try:
        import deep_gemm
    except ImportError as error:
        return f"DeepGEMM over the mapped weights not tried: {error}"
    pull(experts, slots_RS.cuda(), rank)
    group_rows = 128
    for whole in (experts.w13, experts.w2):
        num_experts, num_rows, num_columns = whole.shape
        a = torch.randn(num_experts * group_rows, num_columns, device="cuda").bfloat16()
        group = torch.arange(num_experts, device="cuda", dtype=torch.int32)
        group = group.repeat_interleave(group_rows)
        outputs = []
        for b in (whole, whole.clone()):
            out = torch.empty(len(a), num_rows, dtype=torch.bfloat16, device="cuda")
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, out, group)
            outputs.append(out)
        assert torch.equal(*outputs), "DeepGEMM computes otherwise over mapped weights"
        slot = a[-NUM_SLOTS * group_rows :][:group_rows].float()
        exact = slot @ whole[NUM_LOCAL].float().T
        assert (outputs[0][NUM_LOCAL * group_rows :][:group_rows] - exact).abs().max() < 0.1
    return "DeepGEMM computes the same over mapped and ordinary weights"


def slowest(value: float) -> float:
    """The largest of all ranks' values."""
    largest = torch.tensor([value], device="cuda")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return round(float(largest), 1)


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
    return slowest(statistics.median(times_us[3:]))


def beside_us(call: Callable[[], object], work: Callable[[], object]) -> dict[str, float]:
    """Medians of 20: `work` alone, and `work` and `call` on two streams begun together."""
    side = torch.cuda.Stream()
    alone_us, work_us, call_us = [], [], []
    for turn in range(46):
        dist.barrier()
        start, worked, called = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(SLEEP_CYCLES)  # the host gets ahead, so that launches are not timed
        start.record()
        if turn % 2:
            side.wait_event(start)
            with torch.cuda.stream(side):
                call()
                called.record()
        work()
        worked.record()
        torch.cuda.synchronize()
        if turn < 6:
            continue
        (work_us if turn % 2 else alone_us).append(start.elapsed_time(worked) * 1e3)
        if turn % 2:
            call_us.append(start.elapsed_time(called) * 1e3)
    return {
        "matmul_alone_us": slowest(statistics.median(alone_us)),
        "matmul_beside_us": slowest(statistics.median(work_us)),
        "pull_beside_us": slowest(statistics.median(call_us)),
    }


def time_pulls(experts: LayerExperts, rank: int, num_ranks: int) -> list[dict[str, Any]]:
    """Rows of both patterns with 1 to 8 experts a rank: kernel, copy engine, bound, beside."""
    everyone = range(num_ranks)
    patterns = {"all pull from the next": (None, everyone), "others pull from 0": (0, everyone[1:])}
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    rows = []
    for name, (source, pulling) in patterns.items():
        num_readers = 1 if source is None else len(pulling)
        for num_pulled in (1, 2, 4, 8):
            slots_RS = plan(num_ranks, dict.fromkeys(pulling, num_pulled), source)
            on_device = slots_RS.cuda()
            row = {"pattern": name, "num_ranks": num_ranks, "experts": num_pulled}
            row["bound_us"] = round(
                num_readers * num_pulled * EXPERT_BYTES / LINK_BYTES_A_S * 1e6, 1
            )
            for n in (4, 8, 16, 32, 64):
                row[f"programs_{n}_us"] = graph_us(
                    lambda n=n, on_device=on_device: pull(experts, on_device, rank, n)
                )
            row["copy_engine_us"] = graph_us(
                lambda slots_RS=slots_RS: copy_by_engine(experts, slots_RS, rank)
            )
            row |= beside_us(
                lambda on_device=on_device: pull(experts, on_device, rank, 16), lambda: a @ b
            )
            rows.append(row)
            if rank == 0:
                print(row, flush=True)
    return rows


def copy_by_engine(experts: LayerExperts, slots_RS: Tensor, rank: int) -> None:
    """The same by copies between devices, which need the plan on the host."""
    slots_P, own_PR = slots_of(experts), (experts.w13_R, experts.w2_R)
    for slot, expert in enumerate(slots_RS[rank].tolist()):
        for slots, own_R in zip(slots_P, own_PR, strict=True):
            if expert >= 0:
                slots[slot].copy_(own_R[expert // NUM_LOCAL][expert % NUM_LOCAL])
    if (slots_RS[rank] < 0).all():
        slots_P[0][0, 0, :8].zero_()  # a graph must hold something


def host_us(experts: LayerExperts, slots_RS: Tensor, rank: int) -> float:
    """What the host takes to launch a pull, median of 200."""
    times_us = []
    for _ in range(200):
        torch.cuda.synchronize()
        begun_s = time.perf_counter()
        pull(experts, slots_RS, rank)
        times_us.append((time.perf_counter() - begun_s) * 1e6)
    return slowest(statistics.median(times_us))


def main() -> None:
    """Check on all ranks, then time."""
    parser = argparse.ArgumentParser(description="Check and time experts pulled between GPUs.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file of the times")
    args = parser.parse_args()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.new_group(backend="gloo")
    dist.barrier()  # NCCL takes its memory with the first collective

    everyone = range(num_ranks)
    patterns = ((None, everyone), (0, everyone[1:]))
    for shapes in (ODD_SHAPES, SHAPES):
        experts_of = map_and_check(rank, num_ranks, group, shapes)
        for source, pulling in patterns:
            for number, num_pulled in enumerate((0, 1, 5, NUM_SLOTS)):
                slots_RS = plan(num_ranks, dict.fromkeys(pulling, num_pulled), source)
                check_pull(experts_of, number % NUM_LAYERS, slots_RS, rank)
    full_RS = plan(num_ranks, dict.fromkeys(everyone, NUM_SLOTS), None)
    told = check_grouped_run(experts_of[1], full_RS, rank)
    dist.barrier()
    if rank == 0:
        print(f"equal byte for byte on all ranks; {told}", flush=True)

    rows = time_pulls(experts_of[0], rank, num_ranks)
    launch_us = host_us(experts_of[0], full_RS.cuda(), rank)
    if rank == 0:
        print(f"the host takes {launch_us} us to launch a pull", flush=True)
        seen = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        seen["launch_us"] = launch_us
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps({**row, **seen}) + "\n" for row in rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
