"""Laws of the lever replicate between real ranks: exactness, whatever the load.

Layers have real weights, dispatch and combine are the stand-in for DeepEP's, and the experts' runs
are the reference. A row carries its source rank and its token in two of its columns, so that it is
known again where it arrives.

Shape letters: T rows of a rank, K top-k, R ranks, E experts, H hidden size, L layers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange
from sglang_moelb.ep.low.lanes import HostLanes
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.memory import map_experts
from sglang_moelb.ep.replicas.plan import CopyPlan, plan_copies
from sglang_moelb.ep.standin.deep_ep_buffer import Buffer
from sglang_moelb.ep.standin.experts import run_experts
from sglang_moelb.types import Lever, Policy, Topology

from .layers import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    ROUTINGS,
    layer_input,
    num_tokens_of,
    routing,
    topology,
)
from .ranks import Ranks

pytestmark = pytest.mark.dist

INNER = 8
POLICY = Policy(epoch=1, lever=Lever.REPLICATE, min_copy_rows=1)
Pair = tuple[int, int, int]  # source rank, token, logical expert


class Layer:
    """SGLang's MoE layer, with its method and runner in one."""

    def __init__(self, layer: int, sizes: Topology, rank: int) -> None:
        first = rank * sizes.experts_per_rank
        experts = range(first, first + sizes.experts_per_rank)
        pairs = [weights_of(layer, expert) for expert in experts]
        self.w13_weight = torch.nn.Parameter(torch.stack([w13 for w13, _ in pairs]))
        self.w2_weight = torch.nn.Parameter(torch.stack([w2 for _, w2 in pairs]))
        self.quant_method = self

    @torch.no_grad()
    def apply(self, layer: Any, dispatch_output: Any) -> torch.Tensor:
        """The experts of `layer`, which is this one or is like it."""
        return run_experts(
            dispatch_output.rows,
            dispatch_output.topk_ids,
            dispatch_output.topk_weights,
            layer.w13_weight,
            layer.w2_weight,
        )


class Dispatcher:
    """SGLang's dispatcher and its part for normal mode in one."""

    def __init__(self, buffer: Buffer, num_experts: int) -> None:
        self._buffer = buffer
        self.num_experts = num_experts
        self.made_for = 0

    def _get_impl(self) -> Dispatcher:
        return self

    def _get_buffer(self) -> Buffer:
        self.made_for = self.made_for or self.num_experts
        return self._buffer

    def dispatch(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """To `num_experts` experts."""
        per_rank, _, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
            ids, self.num_experts
        )
        rows, ids, weights, counts, self.handle, _ = self._buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=weights,
        )
        return SimpleNamespace(rows=rows, topk_ids=ids, topk_weights=weights, counts=counts)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """Home again."""
        return self._buffer.combine(rows, self.handle)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one rank saw of a layer: outputs with and without the lever, and what it computed."""

    replicated: torch.Tensor
    stock: torch.Tensor
    computed: list[Pair]
    wrong_weights: list[Pair]
    num_rows: int
    counts: list[int]
    plan: CopyPlan


def weights_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a logical expert, which every rank can make."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    w13 = torch.randn(2 * INNER, HIDDEN_SIZE, generator=generator)
    return w13, torch.randn(HIDDEN_SIZE, INNER, generator=generator)


def run_layers(
    group: dist.ProcessGroup, rank: int, payload: tuple[Topology, list[LayerInput], int, Policy]
) -> list[Ran]:
    """On a rank: the layers of a pass in turn, each with the lever and then without."""
    sizes, inputs, num_slots, policy = payload
    layers = [Layer(number, sizes, rank) for number in range(len(inputs))]
    experts_L = map_experts(layers, num_slots=num_slots, rank=rank, group=group)
    lever = ReplicateLever(layers, experts_L, topology=sizes, rank=rank, lanes=HostLanes())
    dispatcher = Dispatcher(Buffer(group), sizes.num_experts)
    ran = []
    for number, routed in enumerate(inputs):
        ids_TK, weights_TK = routed.ids_TK.contiguous(), routed.weights_TK.contiguous()
        rows_TH = routed.hidden_TD.clone()
        rows_TH[:, 0] = rank
        rows_TH[:, 1] = torch.arange(len(rows_TH))
        plan = plan_copies(routed, policy, sizes, Exchange(group), num_slots=num_slots)
        physical_TK = lever.prepare(number, dispatcher, plan, ids_TK)
        assert dispatcher.num_experts == sizes.num_experts + sizes.num_ranks * num_slots
        received = dispatcher.dispatch(rows_TH, physical_TK, weights_TK)
        computed, wrong = pairs_of(received, plan, experts_L[number], sizes, rank, number)
        out = lever.run(layers[number], received)
        replicated = dispatcher.combine(out)
        assert dispatcher.num_experts == sizes.num_experts
        stock = dispatcher.dispatch(rows_TH, ids_TK, weights_TK)
        assert lever.run(layers[number], stock) is None
        ran.append(
            Ran(
                replicated=replicated,
                stock=dispatcher.combine(layers[number].apply(layers[number], stock)),
                computed=computed,
                wrong_weights=wrong,
                num_rows=len(computed),
                counts=received.counts,
                plan=plan,
            )
        )
    assert dispatcher.made_for == sizes.num_experts
    assert lever.told() == {"num_slots": num_slots, "num_replicated_layers": len(inputs)}
    return ran


def pairs_of(
    received: Any, plan: CopyPlan, experts: Any, sizes: Topology, rank: int, layer: int
) -> tuple[list[Pair], list[Pair]]:
    """Every pair that arrived, and those whose place does not hold their expert's weights."""
    own = sizes.experts_per_rank
    held = plan.slots_RS[rank].tolist()
    computed, wrong = [], []
    for row, places in zip(received.rows.tolist(), received.topk_ids.tolist(), strict=True):
        for place in (place for place in places if place >= 0):
            expert = rank * own + place if place < own else held[place - own]
            pair = (int(row[0]), int(row[1]), expert)
            computed.append(pair)
            w13, w2 = weights_of(layer, expert)
            if not (torch.equal(experts.w13[place], w13) and torch.equal(experts.w2[place], w2)):
                wrong.append(pair)
    return computed, wrong


def run(
    ranks: Ranks, inputs_L: list[list[LayerInput]], num_slots: int, policy: Policy = POLICY
) -> list[list[Ran]]:
    """One list of layers a rank."""
    num_ranks = len(inputs_L[0])
    payloads = [
        (topology(num_ranks), [inputs[rank] for inputs in inputs_L], num_slots, policy)
        for rank in range(num_ranks)
    ]
    return ranks.run(run_layers, payloads)


def routed_pairs(inputs: list[LayerInput]) -> Counter[Pair]:
    """What the routers asked for."""
    return Counter(
        (rank, token, expert)
        for rank, one in enumerate(inputs)
        for token, experts in enumerate(one.ids_TK.tolist())
        for expert in experts
        if expert >= 0
    )


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_pair_is_computed_once_by_a_copy_of_the_right_weights(
    ranks: Ranks, name: str, num_ranks: int, num_slots: int
) -> None:
    inputs_L = [routing(name, num_ranks, seed) for seed in (1, 2)]
    ran_R = run(ranks, inputs_L, num_slots)
    for number, inputs in enumerate(inputs_L):
        ran = [of_rank[number] for of_rank in ran_R]
        assert sum((Counter(one.computed) for one in ran), Counter()) == routed_pairs(inputs)
        assert [one.wrong_weights for one in ran] == [[]] * num_ranks
        for one, routed in zip(ran, inputs, strict=True):
            # float32: the rows of a token are added up in another order, of up to K terms.
            torch.testing.assert_close(one.replicated, one.stock, rtol=1e-4, atol=1e-4)
            assert len(one.replicated) == len(routed.ids_TK)
            assert one.replicated.any() == (num_tokens_of(routed) > 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_are_computed_exactly_by_as_many_rows_as_the_quotas_say(
    ranks: Ranks, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_ranks = (2, 4)[seed % 2]
    inputs = [
        layer_input(
            int(torch.randint(0, 80, (), generator=generator)),
            seed=100 * seed + rank,
            popularity_E=3 * torch.randn(NUM_EXPERTS, generator=generator),
        )
        for rank in range(num_ranks)
    ]
    policy = Policy(epoch=1, lever=Lever.REPLICATE, min_copy_rows=1 + seed, send_rows=seed % 3)
    ran = [of_rank[0] for of_rank in run(ranks, [inputs], 1 + seed % 4, policy)]
    assert sum((Counter(one.computed) for one in ran), Counter()) == routed_pairs(inputs)
    assert [one.wrong_weights for one in ran] == [[]] * num_ranks
    quota_R = ran[0].plan.quota_ER.sum(dim=0).tolist()
    assert [one.num_rows for one in ran] == quota_R
    for one in ran:
        assert sum(one.counts) == one.num_rows
        assert torch.equal(one.plan.slots_RS, ran[0].plan.slots_RS)
        assert torch.equal(one.plan.quota_ER, ran[0].plan.quota_ER)
        torch.testing.assert_close(one.replicated, one.stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_hot_rank_is_brought_to_the_mean(ranks: Ranks, num_ranks: int) -> None:
    hot_E = torch.zeros(NUM_EXPERTS)
    hot_E[: NUM_EXPERTS // num_ranks] = 4.0
    inputs = [layer_input(120, rank, popularity_E=hot_E) for rank in range(num_ranks)]
    ran = [of_rank[0] for of_rank in run(ranks, [inputs], 2)]
    before_R = ran[0].plan.counts_RW.new_tensor([0] * num_ranks)
    for _, _, expert in routed_pairs(inputs).elements():
        before_R[expert * num_ranks // NUM_EXPERTS] += 1
    after_R = [one.num_rows for one in ran]
    mean = sum(after_R) / num_ranks
    assert max(before_R.tolist()) > 1.5 * mean
    assert max(after_R) < 1.05 * mean
    assert (ran[0].plan.slots_RS >= 0).any()


def test_a_balanced_load_is_left_where_it_is_and_no_expert_is_copied(ranks: Ranks) -> None:
    inputs = routing("random", 2)
    policy = Policy(epoch=1, lever=Lever.REPLICATE, min_copy_rows=10_000)
    for one in (of_rank[0] for of_rank in run(ranks, [inputs], 2, policy)):
        assert (one.plan.slots_RS == -1).all()
        assert torch.equal(one.replicated, one.stock)
