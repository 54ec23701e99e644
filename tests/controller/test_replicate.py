"""Laws of how the controller weighs the lever replicate.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.config import merge
from sglang_moelb.controller import cost, load
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.copy_cost import HIDDEN, PRIOR_COPIES, CopyCost
from sglang_moelb.controller.forecast import project
from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.controller.project_downgrade import Projection
from sglang_moelb.controller.project_replicate import CopyRule, after_copies, replicated
from sglang_moelb.controller.rank_times import RankTimes
from sglang_moelb.types import IntArray, Lever, Policy, StepRecord, Topology

from . import world
from .replica_cases import one_hot, rank_skewed, zipf
from .schedule import LARGE, TOPOLOGY, Phase, Server
from .world import FIXED_MS, MS_PER_ROW, SKEWED, record

COSTS = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
POLICY = Policy(epoch=0, lever=Lever.REPLICATE, min_copy_rows=16)


def rule(num_slots: int, **knobs: int) -> CopyRule:
    return CopyRule(policy=replace(POLICY, **knobs), num_slots=num_slots)


def off(rows_E: IntArray, num_ranks: int, one: CopyRule) -> float:
    """max/mean of the estimate less that of the planner's plan."""
    rows_RE = np.zeros((num_ranks, len(rows_E)), dtype=np.int64)
    rows_RE[0] = rows_E
    costs = CopyCosts(min_rows=one.policy.min_copy_rows)
    plan = place_replicas(rows_RE, num_slots=one.num_slots, costs=costs)
    after_L, _ = after_copies(rows_E.reshape(1, num_ranks, -1), one)
    return float(after_L[0] - plan.rows_R.max()) / (rows_E.sum() / num_ranks)


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 128), (4, 128), (4, 256), (8, 128)])
@pytest.mark.parametrize("num_slots", [2, 4, 8])
def test_the_estimate_is_near_what_the_planner_reaches(
    num_ranks: int, num_experts: int, num_slots: int
) -> None:
    offs = []
    for seed in range(6):
        for rows_RE in (
            rank_skewed(num_ranks, num_experts, min(1.3 + 0.5 * seed, num_ranks), seed),
            one_hot(num_ranks, num_experts, 0.05 * (seed + 1), seed),
            zipf(num_ranks, num_experts, 0.4 + 0.15 * seed, mixed=True, seed=seed),
        ):
            offs.append(off(rows_RE.sum(axis=0), num_ranks, rule(num_slots, min_copy_rows=256)))
    assert max(map(abs, offs)) < 0.06
    assert float(np.abs(offs).mean()) < 0.01


def test_the_worked_example_of_the_docstring() -> None:
    after_L, copies_L = after_copies(np.array([[[50, 30], [10, 10]]]), rule(1, min_copy_rows=1))
    assert (after_L.tolist(), copies_L.tolist()) == ([50], [1])


def test_no_copy_is_projected_where_none_is_worth_it() -> None:
    balanced = np.array([[[1000, 1000], [1000, 1000]], [[1000, 1010], [1000, 990]]])
    after_L, copies_L = after_copies(balanced, rule(8))
    assert (after_L.tolist(), copies_L.tolist()) == ([2000, 2010], [0, 0])
    small = np.array([[[10, 9], [1, 1]]])
    assert after_copies(small, rule(8))[0].tolist() == [19]
    empty = np.zeros((1, 2, 2), dtype=np.int64)
    assert after_copies(empty, rule(8))[0].tolist() == [0]


def test_what_a_copy_costs_leaves_the_slowest_rank_more() -> None:
    rows_LRe = np.array([[[4000, 2000, 500], [100, 100, 100]]])
    left = [
        int(after_copies(rows_LRe, rule(3, send_rows=rows, receive_rows=rows))[0][0])
        for rows in (0, 200, 1000)
    ]
    assert left[0] < left[1] < left[2] <= 6500


def projected(one: StepRecord, copies: CopyRule | None, topology: Topology) -> Projection:
    capacity = Policy(epoch=0, capacity_factor=1.25)
    made = project(load.load_of(one, topology), topology, capacity, copies=copies)
    return made[-1]


def test_there_is_a_projection_only_where_there_is_memory() -> None:
    assert projected(record(SKEWED), None, world.TOPOLOGY).lever is Lever.DROP
    assert projected(record(SKEWED), rule(2), world.TOPOLOGY).lever is Lever.REPLICATE
    with_slots = merge(world.config(), {"replicate": {"slots": 2}})
    for config, expected in ((world.config(), False), (with_slots, True)):
        controller = Controller(config, world.TOPOLOGY)
        estimate = world.observe(controller, [record(SKEWED)])[-1].estimate
        levers = [one.lever for one in estimate.forecasts]
        assert (Lever.REPLICATE in levers) is expected


def test_of_a_pass_with_copies_what_they_left_is_known() -> None:
    server = Server(config=merge(world.config(), {"replicate": {"slots": 2}}))
    phase = Phase(name="skewed", skew=2.0)
    policy = replace(POLICY, min_copy_rows=256)
    acted = server.record(phase, 0, policy, 0)
    same = replicated(load.load_of(acted, TOPOLOGY), TOPOLOGY, CopyRule(policy=policy, num_slots=2))
    assert same.max_rows_L.tolist() == acted.rows_after_LR.max(axis=1).tolist()
    assert acted.num_copies_LR is not None
    assert same.num_copies == acted.num_copies_LR.max(axis=1).sum() >= TOPOLOGY.num_layers
    other = replicated(load.load_of(acted, TOPOLOGY), TOPOLOGY, rule(2, min_copy_rows=512))
    without = server.record(phase, 0, Policy(epoch=0), 0)
    plain = replicated(load.load_of(without, TOPOLOGY), TOPOLOGY, rule(2, min_copy_rows=512))
    assert other.max_rows_L.tolist() == plain.max_rows_L.tolist()


def taught(before: CopyCost, one: StepRecord, model: cost.CostModel = COSTS) -> CopyCost:
    return before.updated(RankTimes.own(one), model)


def with_copies(exposed_ms: float, *, own_copies: int = 1) -> StepRecord:
    """A pass in which two layers copied experts to this rank, by so much not hidden."""
    plain = record(SKEWED)
    copies_LR = np.zeros_like(plain.rows_after_LR)
    copies_LR[:, 0] = own_copies
    copies_LR[:, 1] = 1
    return replace(
        plain,
        policy=POLICY,
        num_copies_LR=copies_LR,
        experts_ms_L=plain.experts_ms_L + exposed_ms,
        step_ms=plain.step_ms + exposed_ms * len(copies_LR),
    )


@pytest.mark.parametrize("exposed_ms", [0.0, 0.2, 1.0])
def test_what_copies_do_not_hide_is_learned_and_taken_from_the_gain(exposed_ms: float) -> None:
    learned = HIDDEN
    for _ in range(200):
        learned = taught(learned, with_copies(exposed_ms, own_copies=8))
    assert 8 * learned.copy_ms == pytest.approx(exposed_ms, rel=PRIOR_COPIES / 760)
    assert taught(HIDDEN, record(SKEWED)) is HIDDEN
    assert taught(HIDDEN, with_copies(exposed_ms, own_copies=0)) is HIDDEN
    assert taught(HIDDEN, with_copies(exposed_ms), cost.UNMEASURED) is HIDDEN
    assert taught(HIDDEN, with_copies(1000.0)) is HIDDEN
    assert taught(HIDDEN, with_copies(-1.0)).copy_ms == 0.0


def test_layers_with_copies_do_not_change_what_a_row_costs() -> None:
    past = [load.load_of(one, world.TOPOLOGY) for one in (record(SKEWED), with_copies(5.0))]
    clean = cost.fit(past[:1])
    assert cost.fit(past) == clean
    assert cost.fit(past[1:], clean) == clean
    assert cost.fit(past[1:]).ms_per_row > 0.0, "with nothing else known they are better than none"


def test_the_step_without_a_lever_is_the_same_with_and_without_copies_in_it() -> None:
    plain = cost.step_times([load.load_of(record(SKEWED), world.TOPOLOGY)], COSTS)
    copied = cost.step_times(
        [load.load_of(with_copies(0.5), world.TOPOLOGY)], COSTS, copy_ms=0.5
    )
    assert copied.base_ms == pytest.approx(plain.base_ms)


@pytest.mark.parametrize("exposed_ms", [0.0, 0.3])
def test_the_forecast_of_replicate_is_what_it_then_saves(exposed_ms: float) -> None:
    phase = Phase(name="skewed", skew=2.0, num_passes=100, tokens=LARGE)
    config = merge(world.config(), {"replicate": {"slots": 8, "min_rows": 256}})
    server = Server(config=config, exposed_ms=exposed_ms)
    without, acting = (
        server.record(phase, 0, replace(POLICY, lever=lever, min_copy_rows=256), 0).step_ms
        for lever in (Lever.NONE, Lever.REPLICATE)
    )
    controller = Controller(config, TOPOLOGY)
    for step in range(phase.num_passes):
        one = server.record(phase, step % 8, controller.policy, step)
        effects = controller.step(world.Observation(record=one, now_s=0.2 * step))
    (found,) = (f for f in effects.estimate.forecasts if f.lever is Lever.REPLICATE)
    assert effects.policy.lever is Lever.REPLICATE
    assert found.gain == pytest.approx(1.0 - acting / without, abs=0.015)
    assert found.lost_mass_share == found.low_share == 0.0
