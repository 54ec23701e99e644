"""Laws of the stand-in's `Buffer`, on real gloo processes, against loops over tokens.

Shapes: T tokens of a rank, K top-k columns, R ranks, E experts, N rows received, H hidden size.
Each world size is started once; its processes run every case and save what they got.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_moelb.ep.standin.deep_ep_buffer import Buffer

HIDDEN = 8
ALIGNMENT = 128
Routing = Callable[[torch.Generator, int, int, int], torch.Tensor]


def _spread(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Distinct random experts per token."""
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :k]


def _one_expert(
    generator: torch.Generator, num_tokens: int, num_experts: int, k: int
) -> torch.Tensor:
    return torch.full((num_tokens, k), num_experts - 1)


def _holes(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Half of the selections dropped, and every third token wholly."""
    ids = _spread(generator, num_tokens, num_experts, k)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = -1
    ids[::3] = -1
    return ids


def _skewed(generator: torch.Generator, num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    """Nearly all selections within the first rank's experts."""
    logits = torch.rand(num_tokens, num_experts, generator=generator)
    logits[:, : max(k, num_experts // 8)] += 0.95
    return logits.argsort(dim=1, descending=True)[:, :k]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One routing: `num_tokens` of each rank (repeated cyclically), E, K, and how ids are drawn."""

    num_tokens: tuple[int, ...]
    num_experts: int = 16
    k: int = 4
    routing: Routing = _spread
    dtype: torch.dtype = torch.float32


CASES = {
    "spread": Case(num_tokens=(37, 20, 5, 64)),
    "an_empty_rank": Case(num_tokens=(0, 33)),
    "all_ranks_empty": Case(num_tokens=(0,)),
    "a_single_token": Case(num_tokens=(1, 0)),
    "all_to_one_expert": Case(num_tokens=(50, 7), k=1, routing=_one_expert),
    "top_1": Case(num_tokens=(40, 9), k=1),
    "dropped_selections": Case(num_tokens=(60, 31), routing=_holes),
    "extreme_skew": Case(num_tokens=(300, 2), routing=_skewed),
    "32_columns": Case(num_tokens=(30, 12), num_experts=64, k=32, routing=_holes),
    "bfloat16": Case(num_tokens=(25, 40), dtype=torch.bfloat16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one rank holds before dispatch."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_inputs(case: Case, rank: int) -> Inputs:
    """Deterministic per case and rank, so that parent and workers agree."""
    generator = torch.Generator().manual_seed(1000 * case.num_experts + case.k + 7 * rank)
    num_tokens = case.num_tokens[rank % len(case.num_tokens)]
    return Inputs(
        x=torch.randn(num_tokens, HIDDEN, generator=generator).to(case.dtype),
        ids=case.routing(generator, num_tokens, case.num_experts, case.k).contiguous(),
        weights=torch.rand(num_tokens, case.k, generator=generator),
    )


def _run_case(buffer: Buffer, case: Case, rank: int) -> dict[str, Any]:
    inputs = make_inputs(case, rank)
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(
        inputs.ids, case.num_experts, previous_event=Buffer.capture(), async_finish=True
    )
    event.current_stream_wait()
    rows, ids, weights, counts, handle, _ = buffer.dispatch(
        inputs.x,
        topk_idx=inputs.ids,
        topk_weights=inputs.weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=ALIGNMENT,
    )
    scale = torch.arange(HIDDEN).to(case.dtype)
    (_, with_scale), *_ = buffer.dispatch(
        (inputs.x, inputs.x[:, :3].float().contiguous()),
        topk_idx=inputs.ids,
        topk_weights=inputs.weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    combined, _, _ = buffer.combine(rows * (rank + 1) + scale, handle)
    return {
        "per_rank": per_rank,
        "per_expert": per_expert,
        "in_rank": in_rank,
        "rows": rows,
        "ids": ids,
        "weights": weights,
        "counts": counts,
        "scales": with_scale,
        "combined": combined,
    }


def _work(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    buffer = Buffer(dist.group.WORLD)
    results = {name: _run_case(buffer, case, rank) for name, case in CASES.items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of all cases, one entry per rank."""
    folder: Path = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.start_processes(
        _work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


pytestmark = pytest.mark.dist
each_case = pytest.mark.parametrize("name", list(CASES))


def _expected_rows(case: Case, num_ranks: int, rank: int) -> list[tuple[int, int]]:
    """(source rank, source token) of every row that `rank` is to receive, in order."""
    num_local = case.num_experts // num_ranks
    mine = range(rank * num_local, (rank + 1) * num_local)
    return [
        (source, token)
        for source in range(num_ranks)
        for token, ids in enumerate(make_inputs(case, source).ids.tolist())
        if any(expert in mine for expert in ids)
    ]


@each_case
def test_rows_arrive_once_ordered_by_source_rank_then_token(world: list[Any], name: str) -> None:
    case = CASES[name]
    for rank, got in enumerate(world):
        expected = _expected_rows(case, len(world), rank)
        assert got[name]["rows"].dtype == case.dtype
        assert got[name]["rows"].shape == (len(expected), HIDDEN)
        for row, (source, token) in enumerate(expected):
            sent = make_inputs(case, source).x[token]
            assert torch.equal(got[name]["rows"][row], sent), (rank, row)
            assert torch.equal(got[name]["scales"][row], sent[:3].float()), (rank, row)


@each_case
def test_ids_are_local_or_minus_one_and_weights_zero_there(world: list[Any], name: str) -> None:
    case = CASES[name]
    num_local = case.num_experts // len(world)
    for rank, got in enumerate(world):
        assert got[name]["ids"].dtype == torch.int64
        for row, (source, token) in enumerate(_expected_rows(case, len(world), rank)):
            inputs = make_inputs(case, source)
            for column, expert in enumerate(inputs.ids[token].tolist()):
                here = expert >= 0 and expert // num_local == rank
                local = expert - rank * num_local if here else -1
                weight = inputs.weights[token, column].item() if here else 0.0
                assert got[name]["ids"][row, column] == local
                assert got[name]["weights"][row, column] == weight


@each_case
def test_counts_are_selections_per_local_expert_rounded_up(world: list[Any], name: str) -> None:
    case = CASES[name]
    num_local = case.num_experts // len(world)
    chosen = [
        expert
        for rank in range(len(world))
        for expert in make_inputs(case, rank).ids.reshape(-1).tolist()
    ]
    for rank, got in enumerate(world):
        exact = [chosen.count(rank * num_local + local) for local in range(num_local)]
        assert got[name]["counts"] == [(n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for n in exact]


@each_case
def test_the_layout_counts_each_token_once_per_rank(world: list[Any], name: str) -> None:
    case = CASES[name]
    num_local = case.num_experts // len(world)
    for rank, got in enumerate(world):
        ids = make_inputs(case, rank).ids.tolist()
        targets = [{expert // num_local for expert in row if expert >= 0} for row in ids]
        per_rank = [sum(r in target for target in targets) for r in range(len(world))]
        assert got[name]["per_rank"].tolist() == per_rank
        assert got[name]["per_rank"].dtype == got[name]["per_expert"].dtype == torch.int32
        assert got[name]["in_rank"].tolist() == [
            [r in target for r in range(len(world))] for target in targets
        ]
        flat = [expert for row in ids for expert in row]
        assert got[name]["per_expert"].tolist() == [flat.count(e) for e in range(case.num_experts)]


@each_case
def test_combine_sums_in_float32_in_the_order_of_the_ranks(world: list[Any], name: str) -> None:
    case = CASES[name]
    num_local = case.num_experts // len(world)
    scale = torch.arange(HIDDEN).to(case.dtype)
    for rank, got in enumerate(world):
        inputs = make_inputs(case, rank)
        assert got[name]["combined"].shape == inputs.x.shape
        for token, ids in enumerate(inputs.ids.tolist()):
            total = torch.zeros(HIDDEN)
            for target in sorted({expert // num_local for expert in ids if expert >= 0}):
                total += (inputs.x[token] * (target + 1) + scale).float()
            assert torch.equal(got[name]["combined"][token], total.to(case.dtype)), (rank, token)
