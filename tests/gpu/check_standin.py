"""Compare the real `deep_ep.Buffer` (normal mode) with the stand-in, tensor by tensor, on GPUs.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_standin.py

Needs 2, 4 or 8 GPUs of one host and SGLang's `deep_ep`. One line per case and rank 0's verdict;
the exit status is 1 if any rank found a difference. Both sides get the same inputs: the real one
on NCCL and CUDA, the stand-in on gloo with copies on the host.

Shapes: T tokens of a rank, K top-k columns, R ranks, E experts, N rows received, H hidden size.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.ep.standin import deep_ep_buffer as standin

HIDDEN = 2048
ALIGNMENT = 128
NVL_BYTES_AT_LEAST = 64 << 20
Routing = Callable[[torch.Generator, int, int, int], torch.Tensor]


def spread(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Distinct random experts per token."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :k]


def holes(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Half of the selections -1, and every third token wholly."""
    ids = spread(generator, num_tokens, num_experts, k)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = -1
    ids[::3] = -1
    return ids


def one_rank(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Every selection among the first k experts, which the first rank or two hold."""
    return torch.rand(num_tokens, k, generator=generator).argsort(dim=1)


def last_expert(
    generator: torch.Generator, num_tokens: int, num_experts: int, k: int
) -> torch.Tensor:
    """All to one expert; k must be 1."""
    return torch.full((num_tokens, k), num_experts - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`num_tokens` of each rank, repeated cyclically, and how they are routed."""

    num_tokens: tuple[int, ...]
    num_experts: int = 64
    k: int = 8
    routing: Routing = spread


CASES = {
    "spread": Case(num_tokens=(1024, 777, 64, 513)),
    "one token": Case(num_tokens=(1, 1)),
    "an empty rank": Case(num_tokens=(0, 300)),
    "all ranks empty": Case(num_tokens=(0,)),
    "dropped selections": Case(num_tokens=(900, 333), routing=holes),
    "an empty rank and drops": Case(num_tokens=(0, 129), routing=holes),
    "all to the first experts": Case(num_tokens=(512, 100), routing=one_rank),
    "all to one expert": Case(num_tokens=(700, 20), k=1, routing=last_expert),
    "top-1": Case(num_tokens=(640, 1), k=1),
    "32 columns with drops": Case(num_tokens=(400, 90), k=32, routing=holes),
    "6 columns of 128 experts": Case(num_tokens=(2048, 4096), num_experts=128, k=6),
}


def make_inputs(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bfloat16 [T, H], ids int64 [T, K] and weights float32 [T, K] on the host."""
    generator = torch.Generator().manual_seed(1009 * case.k + 31 * case.num_experts + rank)
    num_tokens = case.num_tokens[rank % len(case.num_tokens)]
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = case.routing(generator, num_tokens, case.num_experts, case.k).to(torch.int64).contiguous()
    return x, ids, torch.rand(num_tokens, case.k, generator=generator)


def run(buffer: Any, case: Case, rank: int, device: torch.device) -> dict[str, Any]:
    """Layout, dispatch and combine as SGLang's `_DeepEPDispatcherImplNormal` calls them."""
    x, ids, weights = (tensor.to(device) for tensor in make_inputs(case, rank))
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
        ids,
        case.num_experts,
        previous_event=buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    rows, row_ids, row_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=ALIGNMENT,
    )
    event.current_stream_wait()
    # What the experts would hand back: different on each rank, exact in bfloat16.
    answer = rows * 2.0 ** (rank % 3)
    combined, _, event = buffer.combine(
        answer,
        handle,
        async_finish=True,
        previous_event=buffer.capture(),
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
        "received rows": rows,
        "received ids": row_ids,
        "received weights": row_weights,
        "counts": torch.tensor(counts),
        "combined": combined,
    }


def differences(real: dict[str, Any], stand: dict[str, Any]) -> list[str]:
    """One text per tensor that is not equal in shape, dtype and every bit of value."""
    found = []
    for name, tensor in real.items():
        mine, theirs = stand[name].cpu(), tensor.cpu()
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            found.append(
                f"{name}: {theirs.dtype} {tuple(theirs.shape)} for real, "
                f"{mine.dtype} {tuple(mine.shape)} for the stand-in"
            )
        elif not torch.equal(mine, theirs):
            where = (mine != theirs).nonzero()[0].tolist()
            found.append(f"{name}: differs first at {where}, {(mine != theirs).sum()} values")
    return found


def make_real_buffer(group: dist.ProcessGroup) -> Any:
    """A `deep_ep.Buffer` for normal mode, sized as SGLang sizes it."""
    from deep_ep import Buffer

    num_nvl_bytes = max(
        config.get_nvl_buffer_size_hint(HIDDEN * 2, group.size())
        for config in (
            Buffer.get_dispatch_config(group.size()),
            Buffer.get_combine_config(group.size()),
        )
    )
    return Buffer(group, max(num_nvl_bytes, NVL_BYTES_AT_LEAST), 0)


def main() -> int:
    """Run all cases; the exit status."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    dist.barrier()
    gloo = dist.new_group(backend="gloo")
    real_buffer = make_real_buffer(dist.group.WORLD)
    stand_buffer = standin.Buffer(gloo)
    num_bad = 0
    for name, case in CASES.items():
        real = run(real_buffer, case, rank, device)
        torch.cuda.synchronize()
        found = differences(real, run(stand_buffer, case, rank, torch.device("cpu")))
        reports: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(reports, found, group=gloo)
        bad = [f"rank {r}: {text}" for r, report in enumerate(reports) for text in report]
        num_bad += bool(bad)
        if rank == 0:
            print("DIFFERS" if bad else "equal  ", name, *bad, sep="  ", flush=True)
    if rank == 0:
        print(
            f"{len(CASES) - num_bad} of {len(CASES)} cases equal on {dist.get_world_size()} ranks"
        )
    dist.barrier(group=gloo)
    dist.destroy_process_group()
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
