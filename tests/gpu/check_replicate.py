"""On 2 or more GPUs: thousands of layers under the lever replicate, every output row checked.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_replicate.py --steps 10000
    torchrun --standalone --nproc-per-node 2 tests/gpu/check_replicate.py --die-at 300; echo $?
    torchrun --standalone --nproc-per-node 4 tests/gpu/check_replicate.py --steps 100

Real plan, copies, DeepEP and lever; weights are small integers, and what stands for the experts'
GEMMs adds up a sample of each chosen expert's words, so that sums are exact and an output row is
right only if every copy was whole and of the right expert when it was read. Each step has other
sizes, another skew and another policy; some have a slow rank, some a run that reads its slots late,
some a rank without tokens. Status 1 if a row is wrong, a rank computes other rows than its quotas
say, or memory grows. With `--die-at` rank 0 ends by a signal while copies are under way: the status
is not 0, and the first command must pass again right after it. `--device cpu` runs the same over
the stand-in for DeepEP. More ranks than GPUs share them, in time slices: right, but slow.

Shape letters: T tokens of a rank, K top-k, N received rows, P places of a rank: own experts and
slots, E experts, H hidden size, L layers, R ranks, S slots of a rank.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
# For more ranks than GPUs.
os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # runs from a checkout, nothing installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from sglang_moelb.ep.balance import LayerInput  # noqa: E402
from sglang_moelb.ep.exchange import exchange_for  # noqa: E402
from sglang_moelb.ep.low.lanes import lanes_of  # noqa: E402
from sglang_moelb.ep.replicas.lever import ReplicateLever  # noqa: E402
from sglang_moelb.ep.replicas.memory import map_experts  # noqa: E402
from sglang_moelb.ep.replicas.plan import CopyPlan, plan_copies  # noqa: E402
from sglang_moelb.types import Lever, Policy, Topology  # noqa: E402

NUM_LAYERS, TOPK = 4, 8
MAX_WORD = 4  # 8 experts of two projections add up to at most 64, exact in bfloat16
SLOW_S = 0.02
FLAT_AFTER, FLAT_BYTES = 200, 64 << 20


class Layer:
    """SGLang's MoE layer, with its method and runner in one."""

    def __init__(self, sizes: argparse.Namespace, generator: torch.Generator) -> None:
        own, inner, hidden = sizes.experts // sizes.ranks, sizes.inner, sizes.hidden
        device = generator.device

        def words(*shape: int) -> torch.nn.Parameter:
            drawn = torch.randint(
                -MAX_WORD, MAX_WORD + 1, shape, generator=generator, device=device
            )
            return torch.nn.Parameter(drawn.bfloat16(), requires_grad=False)

        self.w13_weight = words(own, 2 * inner, hidden)
        self.w2_weight = words(own, hidden, inner)
        self.quant_method = self
        self.busy = torch.zeros(0, device=device)

    def apply(self, layer: Any, dispatch_output: Any) -> torch.Tensor:
        """What stands for the experts of `layer`: for each row the samples of its experts."""
        if self.busy.numel():  # so that slots are read late
            for _ in range(8):
                self.busy = self.busy @ self.busy
        sample_PH = samples(layer.w13_weight, layer.w2_weight)
        return chosen(dispatch_output.topk_ids, len(sample_PH)) @ sample_PH


def samples(w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Words from all over each expert, one a hidden column, bfloat16 `[P, H]`."""
    num_places, hidden = len(w2), w2.shape[1]
    stride = w13[0].numel() // hidden
    column = torch.arange(hidden, device=w13.device)
    at = column * stride + column % stride
    return w13.view(num_places, -1)[:, at] + w2.reshape(num_places, hidden, -1)[..., -1]


def chosen(ids_NK: torch.Tensor, num_places: int) -> torch.Tensor:
    """How often each row chose each place, bfloat16 `[N, P]`; -1 is none."""
    counts = torch.zeros(len(ids_NK), num_places + 1, device=ids_NK.device)
    counts.scatter_add_(1, ids_NK.where(ids_NK >= 0, num_places).long(), torch.ones_like(counts))
    return counts[:, :num_places].bfloat16()


class Dispatcher:
    """SGLang's dispatcher over DeepEP's `Buffer`, and its part for normal mode, in one."""

    def __init__(self, group: dist.ProcessGroup, sizes: argparse.Namespace) -> None:
        if sizes.device == "cpu":
            from sglang_moelb.ep.standin.deep_ep_buffer import Buffer

            self._buffer: Any = Buffer(group)
        else:
            from deep_ep import Buffer

            ranks, row_bytes = sizes.ranks, 2 * sizes.hidden
            configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
            num_bytes = max(one.get_nvl_buffer_size_hint(row_bytes, ranks) for one in configs)
            self._buffer = Buffer(group, num_bytes, 0)
        self.num_experts = sizes.experts

    def _get_impl(self) -> Dispatcher:
        return self

    def _get_buffer(self) -> Any:
        return self._buffer

    def dispatch(self, rows_TH: torch.Tensor, ids_TK: torch.Tensor) -> Any:
        """Send to `num_experts` experts; DeepEP blocks the host."""
        per_rank, _, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
            ids_TK, self.num_experts
        )
        rows, ids, _, counts, self._handle, _ = self._buffer.dispatch(
            rows_TH,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids_TK,
            topk_weights=torch.ones(ids_TK.shape, device=ids_TK.device),
            expert_alignment=1,
        )
        return SimpleNamespace(rows=rows, topk_ids=ids, counts=counts)

    def combine(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Home again."""
        return self._buffer.combine(rows_NH, self._handle)[0]


def routed(sizes: argparse.Namespace, step: int, rank: int) -> LayerInput:
    """This rank's rows: distinct experts of each token, by a popularity that differs by step."""
    every = random.Random(step)  # alike on all ranks
    generator = torch.Generator().manual_seed(100_003 * step + rank)
    num_tokens = every.choice((1, 17, 256, sizes.tokens, sizes.tokens))
    if every.random() < 0.2 and rank == every.randrange(sizes.ranks):
        num_tokens = 0
    popularity_E = torch.randn(
        sizes.experts, generator=torch.Generator().manual_seed(step)
    ) * every.choice((0.0, 1.0, 3.0))
    own = sizes.experts // sizes.ranks
    hot = every.randrange(sizes.ranks)
    popularity_E[hot * own : (hot + 1) * own] += every.choice((0.0, 1.0, 3.0))
    popularity_E[every.randrange(sizes.experts)] += every.choice((0.0, 20.0))
    noise_TE = -torch.rand(num_tokens, sizes.experts, generator=generator).log().neg().log()
    ids_TK = (popularity_E + noise_TE).topk(TOPK, dim=1).indices
    ids_TK[::5, every.randrange(TOPK)] = -1
    ids_TK = ids_TK.to(sizes.device)
    return LayerInput(
        layer=step % NUM_LAYERS,
        ids_TK=ids_TK,
        weights_TK=torch.ones(ids_TK.shape, device=sizes.device),
        logits_TE=torch.empty(0, device=sizes.device),
        hidden_TD=torch.zeros(num_tokens, sizes.hidden, dtype=torch.bfloat16, device=sizes.device),
        flags_T=torch.zeros(num_tokens, dtype=torch.uint8, device=sizes.device),
        scoring="softmax",
    )


def check(
    step: int, out_TH: torch.Tensor, one: LayerInput, whole_EH: torch.Tensor, plan: CopyPlan,
    counts: list[int], rank: int, sizes: argparse.Namespace,
) -> None:  # fmt: skip
    """AssertionError for a wrong row, or for other rows on a place than the plan says."""
    expected_TH = chosen(one.ids_TK, sizes.experts) @ whole_EH
    wrong = int((out_TH != expected_TH).any(dim=1).sum())
    assert not wrong, f"step {step} rank {rank}: {wrong} of {len(out_TH)} rows are wrong"
    own = sizes.experts // sizes.ranks
    quota_E = plan.quota_ER[:, rank].tolist()
    held = [*range(rank * own, (rank + 1) * own), *plan.slots_RS[rank].tolist()]
    said = [quota_E[expert] if expert >= 0 else 0 for expert in held]
    assert counts == said, f"step {step} rank {rank}: computes {counts}, planned {said}"


def steps(sizes: argparse.Namespace, rank: int, group: dist.ProcessGroup) -> int:
    """All steps; how many experts were copied to this rank."""
    device = torch.device(
        sizes.device, torch.cuda.current_device() if sizes.device == "cuda" else None
    )
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=sizes.experts, num_ranks=sizes.ranks, topk=TOPK
    )
    generator = torch.Generator(device).manual_seed(rank)
    layers = [Layer(sizes, generator) for _ in range(NUM_LAYERS)]
    experts_L = map_experts(layers, num_slots=sizes.slots, rank=rank, group=group)
    whole_L = []
    for layer in layers:
        mine = samples(layer.w13_weight.data, layer.w2_weight.data)
        parts = [torch.empty_like(mine) for _ in range(sizes.ranks)]
        dist.all_gather(parts, mine)
        whole_L.append(torch.cat(parts))
    lever = ReplicateLever(
        layers, experts_L, topology=topology, rank=rank, lanes=lanes_of(device)
    )
    exchange = exchange_for(
        dist.group.WORLD, num_layers=NUM_LAYERS, num_experts=sizes.experts, device=device,
        one_host=True,
    )  # fmt: skip
    dispatcher, num_copies, flat = Dispatcher(dist.group.WORLD, sizes), 0, None
    for step in range(sizes.steps):
        every = random.Random(-1 - step)
        one, module = routed(sizes, step, rank), layers[step % NUM_LAYERS]
        is_slow = every.random() < 0.05 and rank == every.randrange(sizes.ranks)
        if is_slow or rank == sizes.slow_rank:
            time.sleep(SLOW_S)
        module.busy = torch.zeros(0)
        if device.type == "cuda" and every.random() < 0.3:
            module.busy = torch.zeros(4096, 4096, device=device)
        policy = Policy(
            epoch=1, lever=Lever.REPLICATE, min_copy_rows=every.choice((1, 32, 256)),
            send_rows=every.choice((0, 16)), receive_rows=every.choice((0, 16)),
        )  # fmt: skip
        plan = plan_copies(one, policy, topology, exchange, num_slots=sizes.slots)
        ids_TK = lever.prepare(one.layer, dispatcher, plan, one.ids_TK)
        if step == sizes.die_at and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        received = dispatcher.dispatch(one.hidden_TD, ids_TK)
        out_TH = dispatcher.combine(lever.run(module, received))
        check(step, out_TH, one, whole_L[one.layer], plan, received.counts, rank, sizes)
        num_copies += int((plan.slots_RS[rank] >= 0).sum())
        if device.type == "cuda" and step >= FLAT_AFTER and step % 100 == 0:
            free = torch.cuda.mem_get_info()[0]
            flat = free if flat is None else flat
            assert free > flat - FLAT_BYTES, f"step {step}: {flat - free} bytes more than before"
        if rank == 0 and step % 500 == 0:
            print(f"step {step}: {num_copies} experts copied to rank 0 so far", flush=True)
    return num_copies


def main() -> None:
    """Run all steps on all ranks."""
    parser = argparse.ArgumentParser(description="Check the lever replicate, row by row.")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank, at most")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--slow-rank", type=int, default=-1, help="late in every step")
    parser.add_argument("--die-at", type=int, default=-1)
    sizes = parser.parse_args()
    rank, sizes.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if sizes.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
    begun_s = time.monotonic()
    num_copies = steps(sizes, rank, dist.new_group(backend="gloo"))
    dist.barrier()
    print(
        f"rank {rank}: {sizes.steps} steps right, {num_copies} copies, "
        f"{time.monotonic() - begun_s:.0f} s",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
