"""Laws of the two collectives, on real gloo ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.exchange import Agreement, Exchange
from sglang_moelb.types import (
    Expansion,
    Level,
    Lever,
    Metric,
    Policy,
    Preference,
    Rule,
    Scope,
)

from .ranks import GROUP_SIZES, Ranks

pytestmark = pytest.mark.dist

EVERYTHING_SET = Policy(
    epoch=7,
    lever=Lever.EXPAND,
    capacity_factor=1.375,
    level=Level.EXPERT,
    scope=Scope.SOURCE,
    metric=Metric.RANDOM,
    preference=Preference.TEXT_FIRST,
    rule=Rule.MACS,
    expansion=Expansion.COMPETE,
    renormalise=True,
    max_extra_experts=3,
    min_batch_tokens=(1 << 31) - 1,
    macs_delta=2.5,
    macs_rho=0.25,
    reason="the leader's",
)


def sizes(num_tokens: int, phase: str = "prefill") -> Sizes:
    return Sizes(
        num_tokens=num_tokens,
        num_prefill_tokens=num_tokens if phase == "prefill" else 0,
        phase=phase,
    )


def gather(group: dist.ProcessGroup, rank: int, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    exchange = Exchange(group)
    return [exchange.gather(row_W) for row_W in rows]


def agree(
    group: dist.ProcessGroup, rank: int, passes: list[tuple[Policy, Sizes]]
) -> list[Agreed]:
    """What the passes agree on, which is the same over the group and in shared memory."""
    over_group, in_memory = (_agree(group, rank, passes, one_host=one) for one in (False, True))
    assert over_group == in_memory
    return in_memory


def _agree(
    group: dist.ProcessGroup, rank: int, passes: list[tuple[Policy, Sizes]], *, one_host: bool
) -> list[Agreed]:
    agreement = Agreement(group, one_host=one_host)
    answers = []
    for policy, mine in passes:
        agreement.start(policy, mine)
        # SGLang's own host collectives share the group and may come in between.
        theirs = torch.tensor([rank])
        dist.all_reduce(theirs, group=group)
        answers.append(agreement.finish())
        num_ranks = dist.get_world_size(group)
        assert theirs.item() == num_ranks * (num_ranks - 1) // 2
    return answers


def nameless(agreed: Agreed) -> Agreed:
    """Without the reason, which does not travel."""
    return Agreed(policy=replace(agreed.policy, reason=""), sizes_R=agreed.sizes_R)


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
def test_every_rank_holds_the_same_bytes_in_rank_order(ranks: Ranks, num_ranks: int) -> None:
    widths = (1, 48, 8 + 8 * 69)
    rows = [
        [torch.randint(-(2**31), 2**31 - 1, (w,), dtype=torch.int32) for w in widths]
        for _ in range(num_ranks)
    ]
    gathered = ranks.run(gather, rows)
    for place in range(len(widths)):
        expected_RW = torch.stack([mine[place] for mine in rows])
        for held in gathered:
            assert held[place].dtype == torch.int32
            assert torch.equal(held[place], expected_RW)


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
def test_an_idle_rank_still_takes_part_in_both_collectives(ranks: Ranks, num_ranks: int) -> None:
    zeros = torch.zeros(5, dtype=torch.int32)
    rows = [[zeros]] * (num_ranks - 1) + [[zeros + 3]]
    assert all(held[0][-1].tolist() == [3] * 5 for held in ranks.run(gather, rows))
    idle, busy = sizes(0, "idle"), sizes(50)
    answers = ranks.run(agree, [[(EVERYTHING_SET, s)] for s in [idle] * (num_ranks - 1) + [busy]])
    for (agreed,) in answers:
        assert agreed.phase == "prefill"
        assert agreed.num_tokens == 50
        assert agreed.sizes_R == (idle,) * (num_ranks - 1) + (busy,)


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
def test_what_each_rank_reports_of_its_experts_reaches_all_also_of_one_without_tokens(
    ranks: Ranks, num_ranks: int
) -> None:
    passes = [
        [
            replace(sizes(0, "idle"), timed_step=(1 << 40) + step, experts_us=1000 * rank + step)
            for step in range(3)
        ]
        for rank in range(num_ranks)
    ]
    answers = ranks.run(agree, [[(EVERYTHING_SET, one) for one in mine] for mine in passes])
    for held in answers:
        told = [agreed.sizes_R for agreed in held]
        assert told == list(zip(*passes, strict=True))


@pytest.mark.parametrize("num_ranks", GROUP_SIZES)
def test_all_ranks_adopt_the_leaders_policy_in_the_same_pass_and_no_other(
    ranks: Ranks, num_ranks: int
) -> None:
    policies = [
        Policy(epoch=0),
        EVERYTHING_SET,
        EVERYTHING_SET,
        replace(EVERYTHING_SET, epoch=8, lever=Lever.NONE),
    ]
    other = Policy(epoch=99, lever=Lever.DROP, capacity_factor=0.5, reason="a wish")
    wishes: list[Any] = [[(p, sizes(5)) for p in policies]]
    wishes += [[(other, sizes(5)) for _ in policies]] * (num_ranks - 1)
    answers = ranks.run(agree, wishes)
    for held in answers:
        assert [replace(a.policy, reason="") for a in held] == [
            replace(p, reason="") for p in policies
        ]
    assert answers[0][1].policy.reason == "the leader's"


def test_the_leader_acts_on_no_digit_that_the_others_do_not_have(ranks: Ranks) -> None:
    """4/3 does not travel whole; with it, ranks would plan unequal capacities."""
    policy = replace(EVERYTHING_SET, capacity_factor=4 / 3, macs_delta=1 / 3, macs_rho=2 / 3)
    answers = ranks.run(agree, [[(policy, sizes(5))]] * 4)
    assert len({nameless(a[0]) for a in answers}) == 1
    assert answers[0][0].policy.capacity_factor == pytest.approx(4 / 3, abs=1e-6)


def test_a_new_reason_of_the_leader_is_taken_over_though_nothing_else_changed(
    ranks: Ranks,
) -> None:
    reworded = replace(EVERYTHING_SET, reason="another")
    passes = [(EVERYTHING_SET, sizes(5)), (reworded, sizes(5))]
    leader = ranks.run(agree, [passes] * 2)[0]
    assert [a.policy.reason for a in leader] == ["the leader's", "another"]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (("idle", "idle"), "idle"),
        (("idle", "decode"), "decode"),
        (("decode", "prefill"), "prefill"),
        (("prefill", "idle"), "prefill"),
    ],
)
def test_a_pass_is_prefill_if_any_rank_prefills(
    ranks: Ranks, phases: tuple[str, str], expected: str
) -> None:
    answers = ranks.run(agree, [[(EVERYTHING_SET, sizes(2, phase))] for phase in phases])
    assert [a[0].phase for a in answers] == [expected] * 2
    assert [s.phase for s in answers[1][0].sizes_R] == list(phases)
