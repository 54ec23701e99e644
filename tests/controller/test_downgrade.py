"""Laws of how the controller weighs the lever downgrade, on a server simulated row by row.

The simulated experts take `true_cost` of a row's time at low precision.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller import cost, load
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.forecast import project
from sglang_moelb.controller.low_cost import PRIOR_LAYERS, LowCost
from sglang_moelb.controller.plan_downgrade import plan_downgrade
from sglang_moelb.controller.project_downgrade import low_ranks
from sglang_moelb.controller.rank_times import RankTimes
from sglang_moelb.hot_config import without_slots
from sglang_moelb.types import Form, Lever, Observation, Policy, StepRecord, Topology

from . import world
from .world import FIXED_MS, MS_PER_ROW, OWN_MS, REST_MS, SKEWED, TOPOLOGY, record

DOWNGRADE = Policy(epoch=0, lever=Lever.DOWNGRADE, capacity_factor=1.0, vision_share=0.7)
COSTS = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
FEW, MANY = 1, 4  # of SKEWED: 1,200 and 4,800 rows an expert of the hot rank


def lowered(
    load_E: Sequence[int],
    policy: Policy,
    *,
    true_cost: float,
    vision: float,
    scale: int = 1,
    step: int = 0,
    topology: Topology = TOPOLOGY,
) -> StepRecord:
    """A pass under `policy` in which low rows take `true_cost` of the time, seen by rank 0."""
    plain = record(
        load_E,
        policy=policy if policy.lever is not Lever.DOWNGRADE else replace(policy, lever=Lever.NONE),
        vision=vision, scale=scale, step=step, topology=topology,
    )  # fmt: skip
    if policy.lever is not Lever.DOWNGRADE:
        return plain
    rows_LR = plain.rows_after_LR
    vision_LR = plain.rows_LEM[..., 1].reshape(*rows_LR.shape, -1).sum(axis=2)
    low_LR = rows_LR * low_ranks(rows_LR, vision_LR, policy)
    cost_LR = FIXED_MS + MS_PER_ROW * (rows_LR - (1.0 - true_cost) * low_LR)
    return replace(
        plain,
        policy=policy,
        low_rows_LR=low_LR,
        experts_ms_L=cost_LR[:, 0],
        step_ms=REST_MS + float(cost_LR.max(axis=1).sum()) + topology.num_layers * OWN_MS,
    )


def serve(
    controller: Controller, num_passes: int, *, true_cost: float, vision: float, scale: int
) -> list[Lever]:
    """Passes under the controller's policies; the levers it published."""
    levers = []
    for step in range(num_passes):
        one = lowered(
            SKEWED, controller.policy, true_cost=true_cost, vision=vision, scale=scale, step=step
        )
        controller.step(Observation(record=one, now_s=0.2 * step))
        levers.append(controller.policy.lever)
    return levers


def config(**controller: float) -> Config:
    """Mode auto in which nothing may lose gate mass."""
    return world.config(**{"quality_budget": 0.0, **controller})


@pytest.mark.parametrize("vision", [0.2, 0.8])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7, 3.0])
def test_the_projection_lowers_the_ranks_that_the_plan_lowers(factor: float, vision: float) -> None:
    policy = replace(DOWNGRADE, capacity_factor=factor)
    one = load.load_of(record(SKEWED, vision=vision), TOPOLOGY)
    projection = project(one, TOPOLOGY, DOWNGRADE, policy)[-1]
    assert projection.lever is Lever.DOWNGRADE
    vision_E = [int(n * vision) for n in SKEWED]
    low_E = plan_downgrade(
        SKEWED, vision_E, [0] * len(SKEWED),
        num_ranks=4, capacity_factor=factor, vision_share=0.7, form=Form.RANK,
    )  # fmt: skip
    rows = sum(n for n, low in zip(SKEWED, low_E, strict=True) if low)
    assert projection.low_share == pytest.approx(rows / sum(SKEWED))
    assert projection.dropped_share == 0


def test_a_pass_with_refused_tokens_is_projected_to_stay_as_it_is_and_one_with_decode_is_not() -> (
    None
):
    plain, one_R = record(SKEWED, vision=1.0), np.array([1, 0, 0, 0])
    decoding = replace(plain, num_protected_tokens_R=one_R)
    refused = replace(decoding, num_refused_tokens_R=one_R)
    shares = [
        project(load.load_of(one, TOPOLOGY), TOPOLOGY, DOWNGRADE, DOWNGRADE)[-1].low_share
        for one in (plain, decoding, refused)
    ]
    assert shares[0] == shares[1] > 0
    assert shares[2] == 0


def test_small_groups_are_believed_to_gain_nothing_and_large_ones_a_third() -> None:
    rows = np.array([[512, 1, 0], [4096, 100_000, 2048]]) * TOPOLOGY.experts_per_rank
    cost_LR = LowCost().of(rows, TOPOLOGY)
    assert cost_LR[0].tolist() == [1.0, 1.0, 1.0]
    assert cost_LR[1].tolist() == pytest.approx([0.66, 0.66, 0.72])


@pytest.mark.parametrize("true_cost", [0.5, 0.9, 1.3])
def test_the_cost_of_a_low_row_is_learned_at_its_group_size_and_no_other(true_cost: float) -> None:
    learned = LowCost()
    one = lowered(SKEWED, DOWNGRADE, true_cost=true_cost, vision=1.0, scale=MANY)
    for _ in range(60):
        learned = learned.updated(RankTimes.own(one), TOPOLOGY, COSTS)
    hot, small = one.rows_after_LR[:1, :1], np.array([[512]]) * TOPOLOGY.experts_per_rank
    assert learned.of(hot, TOPOLOGY)[0, 0] == pytest.approx(true_cost, abs=0.08)
    assert learned.of(small, TOPOLOGY)[0, 0] == 1.0
    assert sum(learned.layers_B) > PRIOR_LAYERS


def test_passes_without_low_rows_or_times_teach_nothing() -> None:
    one = lowered(SKEWED, DOWNGRADE, true_cost=0.5, vision=1.0)
    for useless in (
        record(SKEWED),
        replace(one, experts_ms_L=np.zeros(2)),
        replace(one, experts_ms_L=np.array([np.nan, np.inf])),
        replace(one, experts_ms_L=np.array([1e6, 1e6])),
        replace(one, low_rows_LR=np.zeros((2, 4), dtype=np.int64)),
    ):
        assert LowCost().updated(RankTimes.own(useless), TOPOLOGY, COSTS) == LowCost()
    assert LowCost().updated(RankTimes.own(one), TOPOLOGY, cost.fit(())) == LowCost()


def test_low_passes_do_not_make_rows_look_cheap() -> None:
    passes = [record([n * k for n in SKEWED]) for k in (1, 2, 3, 1, 2)]
    passes += [lowered(SKEWED, DOWNGRADE, true_cost=0.3, vision=1.0, scale=k) for k in (1, 2, 3)]
    model = cost.fit([load.load_of(one, TOPOLOGY) for one in passes])
    assert model.ms_per_row == pytest.approx(MS_PER_ROW)
    assert model.fixed_ms == pytest.approx(FIXED_MS)


def test_what_was_fitted_holds_while_a_rank_is_low_in_every_layer() -> None:
    one = lowered(SKEWED, DOWNGRADE, true_cost=0.66, vision=1.0, scale=MANY)
    loads = [load.load_of(one, TOPOLOGY) for _ in range(4)]
    assert cost.fit(loads, COSTS) == COSTS
    assert cost.fit(loads) == cost.UNMEASURED


def test_auto_lowers_a_hot_rank_of_vision_without_a_budget_of_gate_mass() -> None:
    controller = Controller(config(), TOPOLOGY)
    levers = serve(controller, 40, true_cost=0.66, vision=0.9, scale=MANY)
    assert levers[-20:] == [Lever.DOWNGRADE] * 20
    assert "rows at low precision" in controller.policy.reason


@pytest.mark.parametrize(
    ("true_cost", "vision", "scale"),
    [(0.66, 0.5, MANY), (1.0, 0.9, MANY), (1.3, 0.9, MANY)],
    ids=["text", "no-gain", "slower"],
)
def test_auto_leaves_it_off_where_it_does_not_pay(
    true_cost: float, vision: float, scale: int
) -> None:
    """Where rows are text it never starts; where they gain nothing it stops after it has tried."""
    controller = Controller(config(), TOPOLOGY)
    levers = serve(controller, 120, true_cost=true_cost, vision=vision, scale=scale)
    assert levers[-30:] == [Lever.NONE] * 30
    if vision < 0.7:
        assert set(levers) == {Lever.NONE}


def test_small_groups_are_never_lowered() -> None:
    small = Topology(num_layers=2, num_experts=8, num_ranks=4, topk=2)
    controller = Controller(config(), small)
    for step in range(40):
        one = record([n // 6 for n in SKEWED], vision=0.9, policy=controller.policy, step=step)
        controller.step(Observation(record=one, now_s=0.2 * step))
        assert controller.policy.lever is Lever.NONE


def test_without_slots_auto_never_chooses_it() -> None:
    controller = Controller(without_slots(config()), TOPOLOGY)
    levers = serve(controller, 40, true_cost=0.5, vision=0.9, scale=MANY)
    assert set(levers) == {Lever.NONE}


def test_the_budget_of_low_rows_holds_in_auto_and_in_mode_downgrade() -> None:
    for mode in ("auto", "downgrade"):
        chosen = merge(config(downgrade_budget=0.0), {"mode": mode})
        controller = Controller(chosen, TOPOLOGY)
        levers = serve(controller, 40, true_cost=0.5, vision=0.9, scale=MANY)
        assert set(levers) == {Lever.NONE}
        assert "downgrade_budget is 0" in controller.policy.reason
    chosen = merge(config(downgrade_budget=0.3, quality_window_passes=16), {"mode": "downgrade"})
    controller = Controller(chosen, TOPOLOGY)
    levers = serve(controller, 64, true_cost=0.5, vision=0.9, scale=MANY)
    assert {Lever.NONE, Lever.DOWNGRADE} == set(levers), "on until spent, and again when recovered"


def test_gate_mass_spent_by_another_lever_does_not_close_downgrade() -> None:
    controller = Controller(world.config(quality_budget=0.0), TOPOLOGY)
    assert serve(controller, 20, true_cost=0.6, vision=0.9, scale=MANY)[-1] is Lever.DOWNGRADE
    controller = Controller(merge(config(), {"mode": "downgrade"}), TOPOLOGY)
    assert controller.policy.lever is Lever.DOWNGRADE


def test_of_equal_gains_the_lever_that_loses_no_gate_mass_is_taken() -> None:
    chosen = merge(world.config(quality_budget=0.5), {"capacity": {"factor": 1.9}})
    controller = Controller(chosen, TOPOLOGY)
    levers = serve(controller, 40, true_cost=0.5, vision=0.9, scale=MANY)
    assert levers[-1] is Lever.DOWNGRADE
