"""A record says what happened: it equals a plain count over the rows before and after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.ep.balance import LayerBalancer, LayerInput
from sglang_moelb.ep.build_record import build, rank_rows
from sglang_moelb.ep.clock import mark_on
from sglang_moelb.ep.exchange import Exchange
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.observe import observe
from sglang_moelb.ep.records import PassLog, close, raw_of, slots_of
from sglang_moelb.ep.replicas.plan import CopyPlan, plan_copies
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.ep.status import Ledger, balancedness
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION
from sglang_moelb.types import (
    Level,
    Lever,
    Policy,
    Rule,
    Scope,
    StepRecord,
    Topology,
)

from .layers import NUM_EXPERTS, TOPK, agreed_on, layer_input, num_tokens_of, routing, topology
from .ranks import Ranks

pytestmark = pytest.mark.dist

HOST = torch.device("cpu")
POLICY = Policy(epoch=3, capacity_factor=0.8, min_copy_rows=1)
NUM_SLOTS = 2
MASS_PER_TOKEN = 1.0  # of a token in a layer: these routings are renormalised
NAMES = ("random", "skewed", "ties", "idle-rank", "padded", "last-expert", "all-protected")


def one_pass(
    group: dist.ProcessGroup,
    rank: int,
    payload: tuple[Topology, list[LayerInput], Agreed, Lever],
) -> tuple[StepRecord, list[torch.Tensor]]:
    """On a rank: all layers of a pass; its record, and the ids of each layer after it."""
    sizes, layers, agreed, lever = payload
    exchange = Exchange(group)
    balancer = LayerBalancer(sizes, rank, exchange)
    log = PassLog(
        step=11, agreed=agreed, lever=lever, gate_reason="", begun=mark_on(HOST), timed=True,
        flags_T=layers[0].flags_T,
    )  # fmt: skip
    ids_L = []
    for routed in layers:
        log.marks_L.append({})
        for part in ("dispatch", "balanced", "experts", "combine", "combined"):
            log.marks_L[-1][part] = mark_on(HOST)
        if lever is Lever.NONE:
            ids_L.append(routed.ids_TK)
            continue
        if lever is Lever.DOWNGRADE:
            log.plans_L.append(plan_low(routed, agreed.policy, sizes, exchange))
            ids_L.append(routed.ids_TK)
            continue
        if lever is Lever.REPLICATE:
            plan = plan_copies(routed, agreed.policy, sizes, exchange, num_slots=NUM_SLOTS)
            log.copies_L.append(plan)
            ids_L.append(_at_home(routed.ids_TK, plan, sizes, rank))
            continue
        log.outcomes_L.append(balancer.run(routed, agreed, lever))
        ids_L.append(log.outcomes_L[-1].ids_TC)
    if lever is Lever.NONE:
        counts_RLW, stats_R8 = observe(
            ids_L, layers[0].flags_T, exchange, num_experts=sizes.num_experts
        ), None
    elif lever is Lever.REPLICATE:
        counts_RLW, stats_R8 = torch.stack([plan.counts_RW for plan in log.copies_L], dim=1), None
    elif lever is Lever.DOWNGRADE:
        counts_RLW, stats_R8 = torch.stack([plan.counts_RW for plan in log.plans_L], dim=1), None
    else:
        counts_RLW = torch.stack([outcome.counts_RW for outcome in log.outcomes_L], dim=1)
        stats_8 = torch.stack([outcome.stats_8 for outcome in log.outcomes_L]).sum(dim=0)
        stats_R8 = exchange.gather(stats_8.view(torch.int32)).view(torch.int64)
    shared = SharedCounts.create(sizes)
    told = raw_of(close(log, counts_RLW, stats_R8, slots_of(shared)[1]), now_s=0.0)
    parts = (shared.counts_SRLW, shared.stats_SR8, shared.low_SLE, shared.copied_SLR2)
    arrays = [part[told.slot] for part in parts]
    return build(told, *arrays, sizes, rank, MASS_PER_TOKEN), ids_L


def _at_home(
    ids_TK: torch.Tensor, plan: CopyPlan, sizes: Topology, rank: int
) -> torch.Tensor:
    """For each row an expert whose home is the rank that computes it."""
    physical_TK = reroute(
        ids_TK, plan.counts_RW, plan.slots_RS, plan.quota_ER, my_rank=rank
    )
    num_places = sizes.experts_per_rank + NUM_SLOTS
    return (physical_TK // num_places * sizes.experts_per_rank).where(physical_TK >= 0, -1)


def run_pass(
    ranks: Ranks, name: str, policy: Policy, num_ranks: int = 4
) -> tuple[list[list[LayerInput]], list[tuple[StepRecord, list[torch.Tensor]]]]:
    """Two layers routed as `name`; inputs and results, a rank each."""
    sizes = topology(num_ranks)
    layers = [routing(name, num_ranks, seed) for seed in range(sizes.num_layers)]
    for layer in layers[1:]:  # a token keeps its flags from layer to layer
        for first, later in zip(layers[0], layer, strict=True):
            later.flags_T[:] = first.flags_T
    agreed = agreed_on(policy, layers[0])
    inputs = [
        [
            LayerInput(
                **{**{n: getattr(layer[rank], n) for n in LayerInput.__slots__}, "layer": place}
            )
            for place, layer in enumerate(layers)
        ]
        for rank in range(num_ranks)
    ]
    results = ranks.run(one_pass, [(sizes, mine, agreed, policy.lever) for mine in inputs])
    return inputs, results


def rows_per_rank(ids: torch.Tensor, num_ranks: int) -> np.ndarray:
    experts = [e for row in ids.tolist() for e in row if e >= 0]
    return np.bincount([e * num_ranks // NUM_EXPERTS for e in experts], minlength=num_ranks)


@pytest.mark.parametrize("lever", list(Lever))
@pytest.mark.parametrize("name", NAMES)
def test_rows_before_and_tokens_equal_a_plain_count(ranks: Ranks, name: str, lever: Lever) -> None:
    inputs, results = run_pass(ranks, name, replace(POLICY, lever=lever))
    expected_LEM = np.zeros((2, NUM_EXPERTS, 2), dtype=np.int64)
    for mine in inputs:
        for layer, one in enumerate(mine):
            for flags, experts in zip(one.flags_T.tolist(), one.ids_TK.tolist(), strict=True):
                for expert in experts:
                    if expert >= 0:
                        expected_LEM[layer, expert, flags & FLAG_VISION] += 1
    for rank, (record, _) in enumerate(results):
        assert record.rows_LEM.tolist() == expected_LEM.tolist()
        assert (record.step, record.rank, record.phase) == (11, rank, "prefill")
        assert record.num_tokens_R.tolist() == [num_tokens_of(mine[0]) for mine in inputs]
        for counted_R, flag in (
            (record.num_vision_tokens_R, FLAG_VISION),
            (record.num_protected_tokens_R, FLAG_PROTECTED),
            (record.num_refused_tokens_R, FLAG_REFUSED),
        ):
            there = [(m[0].ids_TK >= 0).any(dim=1) & ((m[0].flags_T & flag) != 0) for m in inputs]
            assert counted_R.tolist() == [int(t.sum()) for t in there]


@pytest.mark.parametrize("lever", list(Lever))
@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", NAMES)
def test_rows_after_equal_what_the_cut_really_left_on_each_rank(
    ranks: Ranks, name: str, scope: Scope, level: Level, lever: Lever
) -> None:
    policy = replace(POLICY, lever=lever, scope=scope, level=level)
    _, results = run_pass(ranks, name, policy)
    real_LR = [
        sum(rows_per_rank(ids_L[layer], 4) for _, ids_L in results).tolist()
        for layer in range(2)
    ]
    assert all(record.rows_after_LR.tolist() == real_LR for record, _ in results)


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("lever", [one for one in Lever if one is not Lever.REPLICATE])
def test_masses_and_row_counts_of_all_ranks_tokens_equal_sums_of_weights(
    ranks: Ranks, lever: Lever, rule: Rule
) -> None:
    inputs, results = run_pass(ranks, "skewed", replace(POLICY, lever=lever, rule=rule))
    pairs = [
        (one, ids)
        for mine, (_, ids_L) in zip(inputs, results, strict=True)
        for one, ids in zip(mine, ids_L, strict=True)
    ]
    routed = sum(float((i.weights_TK * (i.ids_TK >= 0)).sum()) for i, _ in pairs)
    gone = [(i.ids_TK >= 0) & (ids[:, :TOPK] < 0) for i, ids in pairs]
    lost = sum(float((i.weights_TK * g).sum()) for (i, _), g in zip(pairs, gone, strict=True))
    added = sum(int((ids[:, TOPK:] >= 0).sum()) for _, ids in pairs)
    added += sum(
        int(((ids[:, :TOPK] >= 0) & (ids[:, :TOPK] != i.ids_TK)).sum()) for i, ids in pairs
    )
    for record, _ in results:
        assert record.routed_mass == pytest.approx(routed, rel=1e-3)
        assert record.lost_mass == pytest.approx(lost, rel=1e-3, abs=1e-3)
        assert record.num_dropped_rows == sum(int(g.sum()) for g in gone)
        assert record.num_added_rows == added
        assert (record.moved_mass > 0) == (added > 0)
        assert (record.lost_mass > 0) == (lever in (Lever.DROP, Lever.EXPAND))


def test_what_is_lost_on_another_rank_alone_is_not_missed(ranks: Ranks) -> None:
    """With attention parallelism over requests, a batch may lie on one rank only."""
    _, results = run_pass(ranks, "idle-rank", replace(POLICY, lever=Lever.DROP))
    record = results[0][0]
    assert record.num_tokens_R[0] == 0
    assert record.lost_mass > 0
    assert record.lost_mass == results[-1][0].lost_mass


def test_a_dropped_row_is_lost_mass_and_a_rerouted_one_is_not(ranks: Ranks) -> None:
    plain = replace(POLICY, lever=Lever.DROP, level=Level.EXPERT)
    shares = []
    for rule in Rule:
        _, results = run_pass(ranks, "skewed", replace(plain, rule=rule))
        shares.append(sum(r.lost_mass for r, _ in results) / sum(r.routed_mass for r, _ in results))
    assert 0 < shares[Rule.MACS] < shares[Rule.PLAIN] < 1


def test_times_are_in_milliseconds_and_in_the_order_of_the_parts(ranks: Ranks) -> None:
    _, results = run_pass(ranks, "random", POLICY)
    for record, _ in results:
        assert (record.layer_ms_L >= record.experts_ms_L).all()
        assert 0 < record.layer_ms_L.sum() <= record.step_ms < 60_000


def test_balancedness_is_max_over_mean_and_one_without_rows() -> None:
    assert balancedness(np.array([[2, 2], [3, 1], [4, 0], [0, 0]])) == [1.0, 1.5, 2.0, 1.0]


def test_rows_of_experts_add_up_to_their_rank() -> None:
    assert rank_rows(np.arange(8)[None], 4).tolist() == [[1, 5, 9, 13]]


def test_the_ledger_sums_masses_and_shows_shares_of_the_last_pass(ranks: Ranks) -> None:
    _, results = run_pass(ranks, "skewed", replace(POLICY, lever=Lever.DROP))
    record = results[0][0]
    ledger = Ledger(topology(4))
    for _ in range(70):
        ledger.add(record, None)  # type: ignore[arg-type]  # effects are not shown
    totals, newest = ledger.totals(), ledger.newest()
    assert totals["num_passes"] == totals["num_prefill_passes"] == 70
    assert totals["num_passes_by_lever"] == {
        "none": 0, "expand": 0, "drop": 70, "downgrade": 0, "replicate": 0,
    }  # fmt: skip
    assert totals["lost_mass"] == pytest.approx(70 * record.lost_mass)
    assert newest["lost_share"] == pytest.approx(record.lost_mass / record.routed_mass)
    assert max(newest["balance_after_L"]) < max(newest["balance_before_L"])
    assert newest["rows_after_R"] == record.rows_after_LR.sum(axis=0).tolist()


def test_copies_of_experts_are_told_and_nothing_is_lost_or_added(ranks: Ranks) -> None:
    inputs, results = run_pass(ranks, "skewed", replace(POLICY, lever=Lever.REPLICATE))
    for record, _ in results:
        assert record.num_copies_LR is not None
        assert record.num_copies_LR.shape == (2, 4)
        assert (record.num_copies_LR <= NUM_SLOTS).all()
        assert record.num_copies_LR.any()
        assert record.rows_after_LR.sum() == record.rows_LEM.sum()
        assert (record.lost_mass, record.moved_mass) == (0, 0)
        assert (record.num_dropped_rows, record.num_added_rows) == (0, 0)
        tokens = sum(num_tokens_of(mine[0]) for mine in inputs)
        assert record.routed_mass == tokens * 2 * MASS_PER_TOKEN
    ledger = Ledger(topology(4))
    record = results[0][0]
    for _ in range(3):
        ledger.add(record, None)  # type: ignore[arg-type]  # effects are not shown
    assert ledger.totals()["num_copies"] == 3 * int(record.num_copies_LR.sum())
    newest = ledger.newest()
    assert newest["num_copies_R"] == record.num_copies_LR.sum(axis=0).tolist()
    assert max(newest["balance_after_L"]) < max(newest["balance_before_L"])


def test_rows_at_low_precision_are_all_rows_of_the_ranks_that_the_rule_names(ranks: Ranks) -> None:
    policy = replace(POLICY, lever=Lever.DOWNGRADE, capacity_factor=1.0, vision_share=0.3)
    _, results = run_pass(ranks, "no-protected", policy)
    for record, _ in results:
        assert record.low_rows_LR is not None
        rows_LRM = record.rows_LEM.reshape(2, 4, -1, 2).sum(axis=2)
        rows_LR = rows_LRM.sum(axis=2)
        low_LR = rows_LR * 4 > rows_LR.sum(axis=1, keepdims=True)
        low_LR &= rows_LRM[..., 1] > 0.3 * rows_LR
        assert low_LR.any()
        assert not low_LR.all()
        assert (record.low_rows_LR == rows_LR * low_LR).all()
        assert (record.rows_after_LR == rows_LR).all()
    ledger = Ledger(topology(4))
    ledger.add(results[0][0], None)  # type: ignore[arg-type]  # effects are not shown
    one = ledger.newest()
    ledger.add(run_pass(ranks, "no-protected", POLICY)[1][0][0], None)  # type: ignore[arg-type]
    other = ledger.newest()
    assert one["low_ranks"] == [[rank for rank in range(4) if low_LR[at][rank]] for at in (0, 1)]
    assert one["low_rows_R"] == (rows_LR * low_LR).sum(axis=0).tolist()
    assert (other["low_ranks"], other["low_rows_R"]) == ([], [])
    assert ledger.totals()["num_low_rows"] == int((rows_LR * low_LR).sum())


def test_inputs_of_the_tests_themselves_are_reproducible() -> None:
    assert torch.equal(layer_input(9, 4).ids_TK, layer_input(9, 4).ids_TK)
