"""Laws of the plan of the lever downgrade on real ranks: who is lowered, and that all agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.controller.plan_downgrade import plan_downgrade
from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.ep.exchange import Exchange
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.types import Form, Lever, Policy

from .layers import NUM_EXPERTS, ROUTINGS, agreed_on, reflagged, routing, topology
from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

POLICY = Policy(epoch=1, lever=Lever.DOWNGRADE, capacity_factor=1.0, vision_share=0.4)


def run_plan(
    group: dist.ProcessGroup, rank: int, payload: tuple[LayerInput, Agreed]
) -> list[int]:
    """On a rank: the experts to lower."""
    one, agreed = payload
    ids, weights = one.ids_TK.clone(), one.weights_TK.clone()
    plan = plan_low(one, agreed, topology(dist.get_world_size(group)), Exchange(group))
    assert torch.equal(ids, one.ids_TK), "routing was changed"
    assert torch.equal(weights, one.weights_TK), "routing was changed"
    return plan.low_E.tolist()


def planned(ranks: Ranks, inputs: Sequence[LayerInput], policy: Policy = POLICY) -> list[int]:
    """What all ranks of `inputs` plan, which must be the same."""
    agreed = agreed_on(policy, inputs)
    plans = ranks.run(run_plan, [(one, agreed) for one in inputs])
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
    inputs = [
        reflagged(one, one.flags_T & FLAG_VISION) for one in routing(name, num_ranks, seed=3)
    ]
    assert planned(ranks, inputs, policy) == plan_downgrade(
        rows_E(inputs),
        rows_E(inputs, FLAG_VISION),
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


@pytest.mark.parametrize("form", list(Form))
def test_experts_that_receive_protected_rows_are_left_alone(ranks: Ranks, form: Form) -> None:
    inputs = flagged(routing("skewed", 4), FLAG_VISION)
    policy = replace(POLICY, form=form)
    assert any(planned(ranks, inputs, policy))
    some = inputs[2].flags_T.clone()
    some[:5] |= FLAG_PROTECTED
    inputs[2] = reflagged(inputs[2], some)
    low_E, protected_E = planned(ranks, inputs, policy), rows_E(inputs, FLAG_PROTECTED)
    assert sum(protected_E) > 0
    for expert, low in enumerate(low_E):
        rank = expert // 2 * 2
        mates = (rank, rank + 1) if form is Form.RANK else (expert,)
        assert not (low and sum(protected_E[mate] for mate in mates))
