"""Laws of the rule `macs` on real ranks: amounts, capacities that follow the mix, rerouting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sglang_moelb.controller.plan import expert_classes, macs_capacity
from sglang_moelb.ep.macs import MacsState
from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.kernels.token_amounts import token_amounts
from sglang_moelb.types import Level, Lever, Policy, Rule, Scope

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
    run_layers,
    topology,
)
from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

MACS = Policy(epoch=1, lever=Lever.DROP, rule=Rule.MACS, capacity_factor=0.7)


def amounts_of(one: LayerInput, policy: Policy) -> list[int]:
    valid_T = (one.ids_TK >= 0).any(dim=1)
    delta = policy.macs_delta
    return token_amounts(one.hidden_TD, one.flags_T, valid_T, delta=delta).tolist()


def group_amounts(
    one: LayerInput, out: Outcome, policy: Policy, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Amounts of a rank after the lever by group: of protected rows, and of the others."""
    sums = np.zeros((2, num_groups), dtype=np.int64)
    amounts, flags = amounts_of(one, policy), one.flags_T.tolist()
    for token, experts in enumerate(out.ids_TC.tolist()):
        for expert in experts:
            if expert >= 0:
                free = int(not flags[token] & FLAG_PROTECTED)
                sums[free, expert * num_groups // NUM_EXPERTS] += amounts[token]
    return sums[0], sums[1]


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("lever", [Lever.DROP, Lever.EXPAND])
@pytest.mark.parametrize("name", ROUTINGS)
def test_capacity_holds_in_amounts_with_rerouted_rows(
    ranks: Ranks, name: str, lever: Lever, scope: Scope, level: Level, num_ranks: int
) -> None:
    policy = replace(MACS, lever=lever, scope=scope, level=level)
    inputs = routing(name, num_ranks)
    outcomes = balance(ranks, inputs, policy, lever)
    num_groups = num_groups_of(policy, num_ranks)
    pairs = list(zip(inputs, outcomes, strict=True))
    sums = [group_amounts(one, out, policy, num_groups) for one, out in pairs]
    num_tokens = [num_tokens_of(one) for one in inputs]
    if scope is Scope.GLOBAL:
        sums = [(sum(p for p, _ in sums), sum(f for _, f in sums))]
        num_tokens = [sum(num_tokens)]
    for (protected_G, free_G), num in zip(sums, num_tokens, strict=True):
        # Nothing is learned yet in the first layer, so every group's capacity is the base.
        capacity = AMOUNT_ONE * capacity_of(policy, num, num_groups)
        assert (free_G <= np.maximum(capacity - protected_G, 0)).all()


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", ROUTINGS)
def test_rerouted_rows_are_local_new_to_the_token_and_weighed_by_their_score(
    ranks: Ranks, name: str, scope: Scope, num_ranks: int
) -> None:
    policy = replace(MACS, scope=scope, level=Level.EXPERT, capacity_factor=0.9)
    inputs = routing(name, num_ranks)
    outcomes = balance(ranks, inputs, policy, Lever.DROP)
    num_local = NUM_EXPERTS // num_ranks
    num_moved = 0
    for rank, (one, out) in enumerate(zip(inputs, outcomes, strict=True)):
        assert out.ids_TC.shape == one.ids_TK.shape
        moved_TK = (out.ids_TC >= 0) & (out.ids_TC != one.ids_TK)
        num_moved += int(moved_TK.sum())
        assert (one.ids_TK[moved_TK] >= 0).all(), "only rows that were there move"
        assert (out.ids_TC[moved_TK] // num_local == rank).all()
        for token in moved_TK.any(dim=1).nonzero()[:, 0].tolist():
            experts = [e for e in out.ids_TC[token].tolist() if e >= 0]
            assert len(experts) == len(set(experts))
            new = set(out.ids_TC[token][moved_TK[token]].tolist())
            assert not new & set(one.ids_TK[token].tolist())
        if num_tokens_of(one):
            scores_TE = one.logits_TE.softmax(dim=-1)
            best_T1 = one.ids_TK[:, :1].clamp(min=0)
            scale_T = one.weights_TK[:, 0] / scores_TE.gather(1, best_T1)[:, 0]
            wanted_TK = scores_TE.gather(1, out.ids_TC.clamp(min=0)) * scale_T[:, None]
            assert torch.allclose(out.weights_TC[moved_TK], wanted_TK[moved_TK], rtol=1e-5)
        assert out.stats_8 is not None
        assert out.stats_8[7] == int(moved_TK.sum())
        assert out.stats_8[3] == int(((out.ids_TC < 0) & (one.ids_TK >= 0)).sum())
        still_TK = (out.ids_TC == one.ids_TK) & (one.ids_TK >= 0)
        assert torch.equal(out.weights_TC[still_TK], one.weights_TK[still_TK])
    if name in ("random", "skewed", "no-protected"):
        assert num_moved, "there is room for some row to move"


@pytest.mark.parametrize("name", ["random", "padded", "all-protected"])
@pytest.mark.parametrize("lever", [Lever.DROP, Lever.EXPAND])
@pytest.mark.parametrize("renormalise", [False, True])
def test_macs_leaves_protected_tokens_alone_to_the_bit(
    ranks: Ranks, name: str, lever: Lever, renormalise: bool
) -> None:
    policy = replace(MACS, capacity_factor=0.05, renormalise=renormalise)
    inputs = routing(name, 4)
    for one, out in zip(inputs, balance(ranks, inputs, policy, lever), strict=True):
        still_T = (one.flags_T & FLAG_PROTECTED) != 0
        assert torch.equal(out.ids_TC[still_T, :TOPK], one.ids_TK[still_T])
        assert torch.equal(out.weights_TC[still_T, :TOPK], one.weights_TK[still_T])


def test_vision_tokens_weigh_by_entropy_so_more_of_them_fit(ranks: Ranks) -> None:
    inputs = routing("no-protected", 2)
    plain = replace(MACS, rule=Rule.PLAIN, level=Level.EXPERT)
    macs = replace(plain, rule=Rule.MACS)
    num_kept = [
        sum(int((o.ids_TC >= 0).sum()) for o in balance(ranks, inputs, p, Lever.DROP))
        for p in (plain, macs)
    ]
    assert num_kept[1] > num_kept[0]


def rows_with(vision_rows_E: torch.Tensor, text_rows_E: torch.Tensor) -> torch.Tensor:
    """The exchanged rows `[1, W]` of a layer with these counts."""
    width = layout.row_width(NUM_EXPERTS, with_histogram=True)
    rows_RW = torch.zeros(1, width, dtype=torch.int32)
    counts_E5 = layout.counts_of(rows_RW, NUM_EXPERTS)[0]
    counts_E5[:, layout.C_VISION_ROWS] = vision_rows_E.int()
    counts_E5[:, layout.C_TEXT_ROWS] = text_rows_E.int()
    vision, total = int(vision_rows_E.sum()), int((vision_rows_E + text_rows_E).sum())
    rows_RW[:, layout.H_VISION_AMOUNT] = vision * 100
    rows_RW[:, layout.H_AMOUNT] = vision * 100 + (total - vision) * AMOUNT_ONE
    return rows_RW


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("level", list(Level))
def test_capacities_follow_the_learned_mix_as_the_planner_says(level: Level, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = topology(4)
    state = MacsState(sizes)
    vision_E, text_E = (torch.randint(0, 50, (NUM_EXPERTS,), generator=generator) for _ in "vt")
    rows_RW = rows_with(vision_E, text_E)
    base, rho = 1000 * AMOUNT_ONE, 0.5
    num_groups = NUM_EXPERTS if level is Level.EXPERT else 4
    first_G = state.capacities(1, rows_RW, base, rho, level)
    assert first_G.tolist() == [base] * num_groups, "nothing is learned before the first pass"
    state.learn(1, rows_RW)
    assert state.capacities(0, rows_RW, base, rho, level).tolist() == [base] * num_groups
    vision_G, rows_G = (
        x.view(num_groups, -1).sum(dim=1).numpy() for x in (vision_E, vision_E + text_E)
    )
    amounts = rows_RW[0, [layout.H_VISION_AMOUNT, layout.H_AMOUNT]].tolist()
    expected_G = macs_capacity(base, *amounts, expert_classes(vision_G, rows_G), rho)
    assert state.capacities(1, rows_RW, base, rho, level).tolist() == expected_G.tolist()
    if level is Level.EXPERT:
        assert len(set(expected_G.tolist())) > 1


def test_what_a_pass_teaches_moves_capacity_in_the_next(ranks: Ranks) -> None:
    """The same layer twice: the second time it is known which experts see vision."""
    inputs = routing("no-protected", 2)
    for one in inputs:  # experts 0..3 see vision, 4..7 text
        vision_T = one.ids_TK[:, 0] < NUM_EXPERTS // 2
        one.flags_T[:] = vision_T.to(torch.uint8) * FLAG_VISION
        one.ids_TK[:] = torch.where(
            vision_T[:, None], one.ids_TK % 4, 4 + one.ids_TK % 4
        )  # duplicates in a token do not matter to capacities
        one.ids_TK[:, 1:] = -1
        one.weights_TK[:, 1:] = 0.0
    policy = replace(
        MACS, level=Level.EXPERT, macs_rho=1.0, macs_delta=1e-6, capacity_factor=0.2
    )
    agreed = agreed_on(policy, inputs)
    payloads = [(topology(2), [one, one], agreed, Lever.DROP) for one in inputs]
    first, second = zip(*ranks.run(run_layers, payloads), strict=True)
    text_T = [(one.flags_T & FLAG_VISION) == 0 for one in inputs]

    def num_text(outcomes: tuple[Outcome, ...]) -> int:
        pairs = zip(outcomes, text_T, strict=True)
        return sum(int((out.ids_TC[rows_T] >= 4).sum()) for out, rows_T in pairs)

    # Vision rows weigh half, so their share of the amounts is below one half: text experts gain.
    assert num_text(second) > num_text(first)
