"""Laws of learning from the times of all ranks: no lever that loses is kept, whoever is hot.

The experts of each rank take FIXED_MS + MS_PER_ROW * rows, and what a lever adds; the record has
the times of rank 0 by layer, and reports of the other ranks come with the pass after.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller import cost, load
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.copy_cost import HIDDEN
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.controller.project_replicate import CopyRule, after_copies
from sglang_moelb.controller.rank_times import RankTimes, Reports
from sglang_moelb.types import (
    FloatArray,
    IntArray,
    Lever,
    Observation,
    Policy,
    RankReport,
    StepRecord,
    Topology,
)

from . import world
from .world import FIXED_MS, MS_PER_ROW, OWN_MS, REST_MS, SKEWED, TOPOLOGY, record

COSTS = cost.CostModel(fixed_ms=FIXED_MS, ms_per_row=MS_PER_ROW)
SCALE = 4  # of SKEWED: 4,800 rows an expert of the hot rank
NOISE = 0.02
COPY_TOPOLOGY = Topology(num_layers=2, num_experts=128, num_ranks=2, topk=8)
NUM_SLOTS = 32
POLICY = Policy(epoch=0, lever=Lever.REPLICATE, min_copy_rows=16)
Acted = Callable[[StepRecord], tuple[StepRecord, FloatArray]]  # and times of all ranks, [L, R]


@dataclass(kw_only=True)
class Server:
    """Passes with `rows_E` in each layer, of which a lever makes what `acted` says."""

    rows_E: IntArray
    topology: Topology
    acted: Acted
    vision: float = 0.9
    reports: tuple[RankReport, ...] = ()
    levers: list[Lever] = field(default_factory=list)

    def serve(self, controller: Controller, num_passes: int) -> None:
        """Passes under the controller's policies."""
        rng = np.random.default_rng(0)
        for step in range(num_passes):
            policy = controller.policy
            self.levers.append(policy.lever)
            plain = record(
                self.rows_E.tolist(), step=step, vision=self.vision, topology=self.topology
            )
            one, ms_LR = self.acted(replace(plain, policy=policy))
            ms_LR = ms_LR * (1.0 + NOISE * rng.standard_normal(ms_LR.shape))
            own_ms = OWN_MS * self.topology.num_layers
            one = replace(
                one,
                experts_ms_L=ms_LR[:, 0],
                step_ms=REST_MS + float(ms_LR.max(axis=1).sum()) + own_ms,
                reports=self.reports,
            )
            controller.step(Observation(record=one, now_s=0.2 * step))
            self.reports = tuple(
                RankReport(rank=rank, step=step, experts_ms=float(ms))
                for rank, ms in enumerate(ms_LR.sum(axis=0))
                if rank != one.rank
            )


def plain_ms(one: StepRecord) -> FloatArray:
    return np.asarray(FIXED_MS + MS_PER_ROW * one.rows_after_LR)


def hot_on(rank: int) -> IntArray:
    """SKEWED with its hot rank elsewhere."""
    rows_RE = SCALE * np.array(SKEWED).reshape(TOPOLOGY.num_ranks, -1)
    rows_RE[[0, rank]] = rows_RE[[rank, 0]]
    return np.asarray(rows_RE.ravel())


def lowering(rank: int, true_cost: float, share: float = 1.0) -> Acted:
    """Under downgrade `share` of the rows of `rank` run low, and take `true_cost` of the time."""

    def acted(one: StepRecord) -> tuple[StepRecord, FloatArray]:
        if one.policy.lever is not Lever.DOWNGRADE:
            return one, plain_ms(one)
        low_LR = np.zeros_like(one.rows_after_LR)
        low_LR[:, rank] = (share * one.rows_after_LR[:, rank]).astype(np.int64)
        ms_LR = plain_ms(one) - MS_PER_ROW * (1.0 - true_cost) * low_LR
        return replace(one, low_rows_LR=low_LR), ms_LR

    return acted


def lossless() -> Config:
    return world.config(quality_budget=0.0)


@pytest.mark.parametrize("share", [1.0, 0.6], ids=["rank", "fewest"])
@pytest.mark.parametrize("rank", range(TOPOLOGY.num_ranks))
def test_auto_leaves_low_precision_that_loses_wherever_the_hot_rank_is(
    rank: int, share: float
) -> None:
    server = Server(rows_E=hot_on(rank), topology=TOPOLOGY, acted=lowering(rank, 1.3, share))
    server.serve(Controller(lossless(), TOPOLOGY), 150)
    assert Lever.DOWNGRADE in server.levers, "its prior lets it try"
    assert server.levers[-30:] == [Lever.NONE] * 30
    assert server.levers.count(Lever.DOWNGRADE) < 75


@pytest.mark.parametrize("share", [1.0, 0.6], ids=["rank", "fewest"])
@pytest.mark.parametrize("rank", range(TOPOLOGY.num_ranks))
def test_auto_keeps_low_precision_that_pays_wherever_the_hot_rank_is(
    rank: int, share: float
) -> None:
    server = Server(rows_E=hot_on(rank), topology=TOPOLOGY, acted=lowering(rank, 0.66, share))
    server.serve(Controller(lossless(), TOPOLOGY), 60)
    assert server.levers[-20:] == [Lever.DOWNGRADE] * 20


def copying(rows_E: IntArray, exposed_ms: float) -> Acted:
    """Under replicate the planner's copies, of which `exposed_ms` a layer are not hidden."""
    rows_RE = np.tile(rows_E // 2, (2, 1))
    plan = place_replicas(rows_RE, num_slots=NUM_SLOTS, costs=CopyCosts(min_rows=16))
    copies_R = (plan.slots_RS >= 0).sum(axis=1)
    assert copies_R.max() > NUM_SLOTS // 2

    def acted(one: StepRecord) -> tuple[StepRecord, FloatArray]:
        if one.policy.lever is not Lever.REPLICATE:
            return one, plain_ms(one)
        num_layers = COPY_TOPOLOGY.num_layers
        one = replace(
            one,
            rows_after_LR=np.tile(plan.rows_R, (num_layers, 1)),
            num_copies_LR=np.tile(copies_R, (num_layers, 1)),
        )
        return one, plain_ms(one) + exposed_ms * (copies_R > 0)

    return acted


@pytest.mark.parametrize(("exposed_ms", "pays"), [(12.0, False), (0.0, True)])
@pytest.mark.parametrize("hot", [0, 1])
def test_auto_leaves_copies_that_lose_whichever_rank_receives_them(
    hot: int, exposed_ms: float, pays: bool
) -> None:
    rows_R = np.array([300, 100] if hot == 0 else [100, 300])
    rows_E = np.repeat(rows_R, COPY_TOPOLOGY.experts_per_rank)
    tree = {"replicate": {"slots": NUM_SLOTS, "min_rows": 16}, "downgrade": {"slots": 0}}
    server = Server(
        rows_E=rows_E, topology=COPY_TOPOLOGY, acted=copying(rows_E, exposed_ms), vision=0.0
    )
    server.serve(Controller(merge(lossless(), tree), COPY_TOPOLOGY), 200)
    assert Lever.REPLICATE in server.levers
    expected = Lever.REPLICATE if pays else Lever.NONE
    assert server.levers[-30:].count(expected) > 25


def test_few_copies_are_not_charged_for_what_many_cost() -> None:
    many, exposed_ms = 32, 0.42
    copied = replace(record(SKEWED), policy=POLICY, num_copies_LR=np.full((2, 4), many))
    learned = HIDDEN
    for _ in range(100):
        slow = replace(copied, experts_ms_L=copied.experts_ms_L + exposed_ms)
        learned = learned.updated(RankTimes.own(slow), COSTS)
    one_hot = np.full((1, 2, 64), 400)
    one_hot[0, 0, :2] = 12_000
    broad = np.stack([np.full(64, 1000), np.full(64, 300)])[None]
    rule = CopyRule(policy=POLICY, num_slots=many)
    few, most = (int(after_copies(rows, rule)[1][0]) for rows in (one_hot, broad))
    assert 0 < few <= 4
    assert most > 16
    assert learned.copy_ms * many == pytest.approx(exposed_ms, rel=0.05)
    assert learned.copy_ms * few < exposed_ms / 7


def test_of_a_cold_leader_the_others_say_what_many_rows_cost() -> None:
    passes = [record(hot_on(1).tolist(), step=step) for step in range(4)]
    told = {one.step: {1: float(plain_ms(one)[:, 1].sum())} for one in passes}
    loads = [load.load_of(one, TOPOLOGY) for one in passes]
    alone, all_ranks = cost.fit(loads), cost.fit(loads, told=told)
    assert alone.ms_per_row > 1.1 * MS_PER_ROW, "all time is put on the rows"
    assert (all_ranks.fixed_ms, all_ranks.ms_per_row) == pytest.approx((FIXED_MS, MS_PER_ROW))
    assert cost.fit(loads, told={99: {1: 1.0}, 0: {1: float("nan"), 2: 0.0, 3: 1e9}}) == alone


def test_what_was_fitted_to_hot_ranks_holds_while_they_run_low() -> None:
    """Under a lever the ranks that are left alone have few rows."""
    lowered = Policy(epoch=0, lever=Lever.DOWNGRADE)
    for hot in (0, 1):
        low, ms_LR = lowering(hot, 0.7)(replace(record(hot_on(hot).tolist()), policy=lowered))
        told = {0: dict(enumerate(ms_LR.sum(axis=0).tolist()))}
        assert cost.fit([load.load_of(low, TOPOLOGY)], COSTS, told) == COSTS


def test_low_rows_of_another_rank_do_not_make_rows_look_cheap() -> None:
    plain = record(hot_on(1).tolist(), step=0)
    lowered = Policy(epoch=0, lever=Lever.DOWNGRADE)
    low, ms_LR = lowering(1, 0.3)(replace(plain, step=1, policy=lowered))
    loads = [load.load_of(one, TOPOLOGY) for one in (plain, low)]
    told = {0: {1: float(plain_ms(plain)[:, 1].sum())}, 1: {1: float(ms_LR[:, 1].sum())}}
    assert cost.fit(loads, told=told).ms_per_row == pytest.approx(MS_PER_ROW)


@pytest.mark.parametrize("experts_ms", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_report_that_cannot_be_a_time_teaches_nothing(experts_ms: float) -> None:
    low, _ = lowering(1, 0.5)(
        replace(record(hot_on(1).tolist()), policy=Policy(epoch=0, lever=Lever.DOWNGRADE))
    )
    times = RankTimes.of(low, 1, experts_ms)
    assert LowCost().updated(times, TOPOLOGY, COSTS) == LowCost()
    copied = replace(record(SKEWED), policy=POLICY, num_copies_LR=np.ones((2, 4), dtype=np.int64))
    assert HIDDEN.updated(RankTimes.of(copied, 1, experts_ms), COSTS) is HIDDEN


def test_a_report_counts_once_and_only_for_the_pass_that_it_names() -> None:
    window, reports = [record(SKEWED, step=step) for step in (4, 7)], Reports()
    two = (RankReport(1, 7, 5.0), RankReport(2, 3, 6.0))
    (only,) = reports.take(two, window)
    assert only.ms_N.tolist() == [5.0]
    assert only.rows_NG.tolist() == [window[1].rows_after_LR[:, 1].tolist()]
    assert reports.take(two, window) == []
    assert reports.by_step == {7: {1: 5.0}}
    reports.take((), window[:1])
    assert reports.by_step == {}, "what left the window is let go"
