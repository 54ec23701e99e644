"""Laws of the lever `expand` on real ranks: who may be added, how many, and what is still cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from sglang_moelb.ep.balance import MAX_COLUMNS, LayerBalancer
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED
from sglang_moelb.types import Expansion, Level, Lever, Policy, Scope, Topology

from .layers import (
    NUM_EXPERTS,
    ROUTINGS,
    TOPK,
    LayerInput,
    Outcome,
    agreed_on,
    balance,
    capacity_of,
    num_groups_of,
    num_tokens_of,
    routing,
)
from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

EXPAND = Policy(epoch=1, lever=Lever.EXPAND, capacity_factor=1.25)


def num_added(outcomes: list[Outcome]) -> int:
    return sum(int((out.ids_TC[:, TOPK:] >= 0).sum()) for out in outcomes)


def load_of(
    one: LayerInput, out: Outcome, num_groups: int
) -> tuple[Counter[int], Counter[int]]:
    """Rows of a rank after the lever by group: protected ones, and the others."""
    protected: Counter[int] = Counter()
    others: Counter[int] = Counter()
    for flags, experts in zip(one.flags_T.tolist(), out.ids_TC.tolist(), strict=True):
        counter = protected if flags & FLAG_PROTECTED else others
        counter.update(e * num_groups // NUM_EXPERTS for e in experts if e >= 0)
    return protected, others


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_rank_dispatches_equally_many_columns_an_idle_one_too(
    ranks: Ranks, name: str, num_ranks: int
) -> None:
    """DeepEP's receivers read rows with their own number of columns."""
    outcomes = balance(ranks, routing(name, num_ranks), EXPAND, Lever.EXPAND)
    num_columns = {out.ids_TC.shape[1] for out in outcomes}
    assert num_columns == {TOPK + NUM_EXPERTS // num_ranks}
    assert all(out.weights_TC.shape == out.ids_TC.shape for out in outcomes)


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_added_rows_are_of_the_ranks_own_experts_and_new_to_the_token(
    ranks: Ranks, name: str, num_ranks: int
) -> None:
    inputs = routing(name, num_ranks)
    outcomes = balance(ranks, inputs, EXPAND, Lever.EXPAND)
    num_local = NUM_EXPERTS // num_ranks
    for rank, (one, out) in enumerate(zip(inputs, outcomes, strict=True)):
        added_TX = out.ids_TC[:, TOPK:]
        there_TX = added_TX >= 0
        assert ((added_TX // num_local == rank) | ~there_TX).all()
        assert (out.weights_TC[:, TOPK:][there_TX] > 0).all()
        assert (out.weights_TC[:, TOPK:][~there_TX] == 0).all()
        for routed, added in zip(one.ids_TK.tolist(), added_TX.tolist(), strict=True):
            experts = [e for e in (*routed, *added) if e >= 0]
            assert len(experts) == len(set(experts))
    if name != "one-token":  # whose one free place may be in a full group
        assert (num_added(outcomes) > 0) == (name != "all-protected")


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", ROUTINGS)
def test_capacity_holds_over_routed_and_added_rows(
    ranks: Ranks, name: str, scope: Scope, level: Level, num_ranks: int
) -> None:
    policy = replace(EXPAND, scope=scope, level=level)
    inputs = routing(name, num_ranks)
    outcomes = balance(ranks, inputs, policy, Lever.EXPAND)
    num_groups = num_groups_of(policy, num_ranks)
    loads = [load_of(*pair, num_groups) for pair in zip(inputs, outcomes, strict=True)]
    num_tokens = [num_tokens_of(one) for one in inputs]
    if scope is Scope.GLOBAL:
        merged = (sum((p for p, _ in loads), Counter()), sum((o for _, o in loads), Counter()))
        loads, num_tokens = [merged], [sum(num_tokens)]
    for (protected, others), num in zip(loads, num_tokens, strict=True):
        capacity = capacity_of(policy, num, num_groups)
        for group in range(num_groups):
            assert others[group] <= max(capacity - protected[group], 0)


def test_a_larger_capacity_adds_more_and_fills_what_there_is(ranks: Ranks) -> None:
    inputs = routing("no-protected", 4)
    added = [
        num_added(balance(ranks, inputs, replace(EXPAND, capacity_factor=f), Lever.EXPAND))
        for f in (0.5, 1.0, 1.25, 2.0, 1000.0)
    ]
    assert added == sorted(added)
    num_local = NUM_EXPERTS // 4
    routed_here = sum(
        int((one.ids_TK // num_local == rank).sum()) for rank, one in enumerate(inputs)
    )
    all_rows = sum(num_tokens_of(one) for one in inputs) * num_local - routed_here
    assert added[-1] == all_rows, "with room for all, every local expert gets every token"
    assert added[0] < added[2] < added[-1]


@pytest.mark.parametrize("max_extra", [1, 2])
def test_no_token_gets_more_than_max_extra_experts_and_gets_its_best(
    ranks: Ranks, max_extra: int
) -> None:
    policy = replace(EXPAND, capacity_factor=1000.0, max_extra_experts=max_extra)
    inputs = routing("no-protected", 2)
    num_local = NUM_EXPERTS // 2
    for rank, (one, out) in enumerate(
        zip(inputs, balance(ranks, inputs, policy, Lever.EXPAND), strict=True)
    ):
        assert out.ids_TC.shape[1] == TOPK + max_extra
        scores = one.logits_TE.softmax(dim=-1).tolist()
        for token, routed in enumerate(one.ids_TK.tolist()):
            free = [e for e in range(rank * num_local, (rank + 1) * num_local) if e not in routed]
            best = sorted(free, key=lambda e: -scores[token][e])[:max_extra]
            assert [e for e in out.ids_TC[token, TOPK:].tolist() if e >= 0] == best


def test_added_rows_weigh_their_score_on_the_scale_of_the_gate(ranks: Ranks) -> None:
    inputs = routing("no-protected", 2)
    for one, out in zip(
        inputs,
        balance(ranks, inputs, replace(EXPAND, capacity_factor=1000.0), Lever.EXPAND),
        strict=True,
    ):
        scores_TE = one.logits_TE.softmax(dim=-1)
        scale_T = one.weights_TK[:, 0] / scores_TE.gather(1, one.ids_TK[:, :1])[:, 0]
        added_TX = out.ids_TC[:, TOPK:]
        expected_TX = scores_TE.gather(1, added_TX.clamp(min=0)) * scale_T[:, None]
        expected_TX = expected_TX.where(added_TX >= 0, 0.0)
        assert torch.allclose(out.weights_TC[:, TOPK:], expected_TX, rtol=1e-5)


def test_sigmoid_routers_are_scored_by_sigmoid(ranks: Ranks) -> None:
    inputs = [
        LayerInput(**{**{n: getattr(i, n) for n in LayerInput.__slots__}, "scoring": "sigmoid"})
        for i in routing("no-protected", 2)
    ]
    policy = replace(EXPAND, capacity_factor=1000.0)
    for one, out in zip(inputs, balance(ranks, inputs, policy, Lever.EXPAND), strict=True):
        scores_TE = one.logits_TE.sigmoid()
        scale_T = one.weights_TK[:, 0] / scores_TE.gather(1, one.ids_TK[:, :1])[:, 0]
        there_TX = out.ids_TC[:, TOPK:] >= 0
        raw_TX = scores_TE.gather(1, out.ids_TC[:, TOPK:].clamp(min=0)) * scale_T[:, None]
        assert torch.allclose(out.weights_TC[:, TOPK:][there_TX], raw_TX[there_TX], rtol=1e-5)


@pytest.mark.parametrize("name", ["random", "skewed", "idle-rank"])
def test_renormalising_an_expansion_keeps_each_tokens_sum(ranks: Ranks, name: str) -> None:
    policy = replace(EXPAND, renormalise=True)
    inputs = routing(name, 4)
    for one, out in zip(inputs, balance(ranks, inputs, policy, Lever.EXPAND), strict=True):
        left_T = (out.ids_TC >= 0).any(dim=1)
        before_T, after_T = one.weights_TK.sum(dim=1), out.weights_TC.sum(dim=1)
        assert torch.allclose(after_T[left_T], before_T[left_T], rtol=1e-5)
    plain = balance(ranks, inputs, EXPAND, Lever.EXPAND)
    pairs = zip(inputs, plain, strict=True)
    changes = [float((o.weights_TC.sum() - i.weights_TK.sum()).abs()) for i, o in pairs]
    assert max(changes) > 0.1, "without renormalising the sums change"


class _Alone:
    """An exchange of a rank whose peer holds what it holds."""

    def gather(self, row_W: torch.Tensor) -> torch.Tensor:
        return row_W.expand(2, -1).contiguous()


def test_protected_tokens_are_equal_to_the_bit_beside_many_candidate_columns() -> None:
    """Sums over 6 and over 32 columns round differently, though 26 of them are zero."""
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(2000, 64, generator=generator)
    weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(6, dim=-1)
    flags_T = torch.zeros(2000, dtype=torch.uint8)
    flags_T[::2] = FLAG_PROTECTED
    routed = LayerInput(
        layer=0,
        ids_TK=ids_TK,
        weights_TK=weights_TK / weights_TK.sum(dim=-1, keepdim=True),
        logits_TE=logits_TE,
        hidden_TD=torch.zeros(2000, 4),
        flags_T=flags_T,
        scoring="softmax",
    )
    policy = replace(EXPAND, renormalise=True)
    agreed = agreed_on(policy, [routed, routed])
    sizes = Topology(num_layers=1, num_experts=64, num_ranks=2, topk=6)
    balancer = LayerBalancer(sizes, 0, _Alone())  # type: ignore[arg-type]
    out = balancer.run(routed, agreed, Lever.EXPAND)
    assert out.ids_TC.shape == (2000, MAX_COLUMNS)
    assert torch.equal(out.weights_TC[::2, :6], routed.weights_TK[::2])
    assert not torch.equal(out.weights_TC[1::2, :6], routed.weights_TK[1::2])


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", ["random", "skewed", "idle-rank", "no-protected", "padded"])
def test_filling_drops_no_routed_row_that_drop_alone_would_keep(
    ranks: Ranks, name: str, scope: Scope, level: Level, num_ranks: int
) -> None:
    policy = replace(EXPAND, scope=scope, level=level, expansion=Expansion.FILL)
    inputs = routing(name, num_ranks)
    groups = num_groups_of(policy, num_ranks)

    def routed_load(expansion: Expansion, lever: Lever) -> list[object]:
        outcomes = balance(ranks, inputs, replace(policy, expansion=expansion), lever)
        kept = Counter(
            (rank if scope is Scope.SOURCE else 0, e * groups // NUM_EXPERTS)
            for rank, out in enumerate(outcomes)
            for e in out.ids_TC[:, :TOPK].flatten().tolist()
            if e >= 0
        )
        return sorted((place, num) for place, num in kept.items())

    assert routed_load(Expansion.FILL, Lever.EXPAND) == routed_load(Expansion.FILL, Lever.DROP)


def test_competing_candidates_may_displace_routed_rows(ranks: Ranks) -> None:
    inputs = routing("no-protected", 4)
    num_routed = [
        sum(
            int((out.ids_TC[:, :TOPK] >= 0).sum())
            for out in balance(ranks, inputs, replace(EXPAND, expansion=e), Lever.EXPAND)
        )
        for e in Expansion
    ]
    assert num_routed[Expansion.COMPETE] < num_routed[Expansion.FILL]
