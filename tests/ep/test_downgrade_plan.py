"""Laws of the plan of the lever downgrade on real ranks: who is lowered, and that all agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.controller.plan_downgrade import plan_downgrade
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.modality import DECODES, REFUSES
from sglang_moelb.kernels.row_layout import FLAG_REFUSED, FLAG_VISION
from sglang_moelb.types import Form, Lever, Policy

from .layers import NUM_EXPERTS, ROUTINGS, reflagged, routing, topology
from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

POLICY = Policy(epoch=1, lever=Lever.DOWNGRADE, capacity_factor=1.0, vision_share=0.4)


def run_plan(
    group: dist.ProcessGroup, rank: int, payload: tuple[LayerInput, Policy]
) -> list[int]:
    """On a rank: the experts to lower."""
    one, policy = payload
    ids, weights = one.ids_TK.clone(), one.weights_TK.clone()
    plan = plan_low(one, policy, topology(dist.get_world_size(group)), Exchange(group))
    assert torch.equal(ids, one.ids_TK), "routing was changed"
    assert torch.equal(weights, one.weights_TK), "routing was changed"
    return plan.low_E.tolist()


def planned(ranks: Ranks, inputs: Sequence[LayerInput], policy: Policy = POLICY) -> list[int]:
    """What all ranks of `inputs` plan, which must be the same."""
    plans = ranks.run(run_plan, [(one, policy) for one in inputs])
    assert plans.count(plans[0]) == len(plans), "ranks disagree"
    return list(plans[0])


def flagged(inputs: Sequence[LayerInput], flag: int) -> list[LayerInput]:
    return [reflagged(one, torch.full_like(one.flags_T, flag)) for one in inputs]


def rows_E(inputs: Sequence[LayerInput], flag: int = 0) -> list[int]:
    """Rows of each expert over all ranks, of tokens with `flag`."""
    rows = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    for one in inputs:
        ids = one.ids_TK[(one.flags_T & flag) == flag].flatten()
        rows += torch.bincount(ids[ids >= 0], minlength=NUM_EXPERTS)
    return [int(n) for n in rows]


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("name", ROUTINGS)
def test_all_ranks_plan_what_the_rule_says_of_the_rows_of_all(
    ranks: Ranks, name: str, form: Form, num_ranks: int
) -> None:
    policy = replace(POLICY, form=form)
    inputs = routing(name, num_ranks, seed=3)
    assert planned(ranks, inputs, policy) == plan_downgrade(
        rows_E(inputs),
        rows_E(inputs, FLAG_VISION),
        rows_E(inputs, FLAG_REFUSED),
        num_ranks=num_ranks,
        capacity_factor=policy.capacity_factor,
        vision_share=policy.vision_share,
        form=form,
    )


def test_a_hot_rank_is_lowered_whole_where_its_rows_are_vision_and_never_for_text(
    ranks: Ranks,
) -> None:
    inputs = routing("skewed", 4)
    assert planned(ranks, flagged(inputs, FLAG_VISION)) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert planned(ranks, flagged(inputs, 0)) == [0] * NUM_EXPERTS


def test_nothing_is_lowered_where_no_rank_is_above_the_factor(ranks: Ranks) -> None:
    inputs = flagged(routing("skewed", 4), FLAG_VISION)
    assert not any(planned(ranks, inputs, replace(POLICY, capacity_factor=4.0)))


def with_rows(inputs: list[LayerInput], kind: int, num_rows: int) -> list[LayerInput]:
    """The inputs with the first rows of rank 2 of another kind."""
    flags_T = inputs[2].flags_T.clone()
    flags_T[:num_rows] |= kind
    return [*inputs[:2], reflagged(inputs[2], flags_T), *inputs[3:]]


@pytest.mark.parametrize("form", list(Form))
def test_decode_rows_in_a_mixed_pass_keep_no_rank_from_being_lowered(
    ranks: Ranks, form: Form
) -> None:
    policy = replace(POLICY, form=form)
    inputs = flagged(routing("skewed", 4), FLAG_VISION)
    free_E = planned(ranks, inputs, policy)
    assert any(free_E)
    decoding = with_rows(inputs, DECODES, len(inputs[2].flags_T))
    assert planned(ranks, decoding, policy) == free_E


@pytest.mark.parametrize("form", list(Form))
def test_experts_that_receive_refused_rows_are_left_alone_and_no_others(
    ranks: Ranks, form: Form
) -> None:
    """`form` rank spares their whole rank, and `fewest` may take another in their place."""
    policy = replace(POLICY, form=form, capacity_factor=0.2)
    inputs = flagged(routing("random", 4), FLAG_VISION)
    free_E = planned(ranks, inputs, policy)
    for num_rows in (1, 2, 3):
        some = with_rows(inputs, REFUSES, num_rows)
        low_E, refused_E = planned(ranks, some, policy), rows_E(some, FLAG_REFUSED)
        assert 0 < sum(n > 0 for n in refused_E) < NUM_EXPERTS
        for expert, low in enumerate(low_E):
            rank = expert // 2 * 2
            mates = (rank, rank + 1) if form is Form.RANK else (expert,)
            spared = sum(refused_E[mate] for mate in mates) > 0
            assert not (low and spared)
            beside = form is Form.FEWEST and sum(refused_E[rank : rank + 2]) > 0
            assert spared or beside or low == free_E[expert]
