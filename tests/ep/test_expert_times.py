"""Laws of what a rank that is not the leader reports of its experts, between the seams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_moelb.config import Config
from sglang_moelb.ep import points
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.build_record import build
from sglang_moelb.ep.clock import HostMark
from sglang_moelb.ep.controller_messages import RawPass
from sglang_moelb.ep.expert_times import ExpertTimes
from sglang_moelb.ep.modality import DECODES, PLAIN, Requests, RowWindow
from sglang_moelb.ep.open_pass import TIMED_EVERY, TIMED_FIRST
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Lever, Policy, RankReport

from .layers import topology
from .test_runtime import NUM_RANKS, PREFILL, Agreeing, Dispatcher, Mirroring, serve

DECODE = Requests(runs=((40, DECODES),), phase="decode")


class Follower:
    """Rank 1 of two, under a policy that the leader would have sent."""

    def __init__(self, lever: Lever = Lever.NONE) -> None:
        self.dispatcher = Dispatcher()
        self.told: list[Sizes] = []
        agreeing = Agreeing()
        start = agreeing.start

        def led(_: Policy, sizes: Sizes) -> None:
            self.told.append(sizes)
            start(Policy(epoch=1, lever=lever, capacity_factor=0.5), sizes)

        agreeing.start = led  # type: ignore[method-assign]
        seat = Seat(
            topology=replace(topology(NUM_RANKS), num_layers=1),
            rank=1,
            device=torch.device("cpu"),
            window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
            layer_of_dispatcher={id(self.dispatcher): 0},
            scoring=("softmax",),
            form="hook",
        )
        exchange: Any = Mirroring()
        exchange.offer = exchange.gather
        self.runtime = Runtime(seat, Config(), agreeing, exchange, None)  # type: ignore[arg-type]

    def serve(self, requests: Requests) -> Sizes:
        """One pass; what was reported at its beginning."""
        serve(self.runtime, self.dispatcher, requests)
        return self.told[-1]


@pytest.fixture(autouse=True)
def passed() -> Iterator[None]:
    for seam in SEAMS:
        points.num_passed[seam.name] += 1
    yield
    points.detach()


def test_a_report_names_the_newest_timed_pass_that_had_ended() -> None:
    """It is looked for while the messages of a pass travel, so it goes with the one after."""
    follower = Follower()
    kinds = [PREFILL, DECODE, PREFILL, DECODE, DECODE, PREFILL, DECODE, DECODE]
    told = [follower.serve(one) for one in kinds]
    assert [(one.timed_step, one.experts_us > 0) for one in told] == [
        (0, False), (0, False), (0, True), (0, True), (2, True), (2, True), (2, True), (5, True),
    ]  # fmt: skip


def test_passes_are_timed_as_often_as_on_the_leader() -> None:
    follower, numbers = Follower(), range(1, TIMED_FIRST + 2 * TIMED_EVERY)
    told = {follower.serve(PREFILL).timed_step for _ in numbers} - {0}
    timed = {n - 1 for n in numbers if n <= TIMED_FIRST or n % TIMED_EVERY == 0} - {0}
    assert told == timed - {max(numbers) - 1, max(numbers) - 2}


def test_passes_of_decode_and_of_levers_that_need_no_report_are_not_timed() -> None:
    assert [Follower().serve(DECODE).experts_us for _ in range(3)] == [0] * 3
    dropping = Follower(Lever.DROP)
    assert [dropping.serve(PREFILL).experts_us for _ in range(3)] == [0] * 3


def test_a_rank_without_tokens_reports_what_its_experts_took_for_the_others() -> None:
    follower = Follower()
    empty = Requests(runs=((0, PLAIN),), phase="prefill")
    told = [follower.serve(empty) for _ in range(3)]
    assert told[-1].num_tokens == 0
    assert told[-1].experts_us > 0


class Mark(HostMark):
    """Reached when told to."""

    def __init__(self, s: float) -> None:
        self.s, self.reached, self.given_back = s, False, 0

    def is_reached(self) -> bool:
        return self.reached

    def give_back(self) -> None:
        self.given_back += 1


def test_times_are_summed_over_layers_once_reached_and_marks_are_given_back() -> None:
    marks = [Mark(s) for s in (1.0, 1.002, 2.0, 2.0005)]
    times = ExpertTimes()
    times.add(6, [dict(zip(("experts", "combine"), marks[at : at + 2], strict=True))
                  for at in (0, 2)])  # fmt: skip
    times.look()
    assert (times.step, times.experts_us) == (0, 0)
    assert not any(mark.given_back for mark in marks)
    marks[-1].reached = True
    times.look()
    times.look()
    assert (times.step, times.experts_us) == (6, 2500)
    assert [mark.given_back for mark in marks] == [1] * 4
    times.add(7, [{"experts": marks[0]}])
    times.look()
    assert times.step == 6, "a layer that was not marked as a whole gives no time"


def test_the_record_has_the_reports_of_the_other_ranks() -> None:
    sizes = topology(NUM_RANKS)
    mine, other = (
        Sizes(num_tokens=1, num_prefill_tokens=1, phase="prefill", timed_step=s, experts_us=us)
        for s, us in ((3, 10), (4, 1500))
    )
    told = RawPass(
        slot=0, now_s=0.0, step=5, agreed=Agreed(policy=Policy(epoch=0), sizes_R=(mine, other)),
        lever=Lever.NONE, gate_reason="", experts_ms_L=[], layer_ms_L=[], balance_ms=0.0,
        step_ms=1.0,
    )  # fmt: skip
    shared = SharedCounts.create(sizes)
    width = row_width(sizes.num_experts, with_histogram=False)
    assert shared.counts_SRLW.shape[-1] >= width
    parts = (shared.counts_SRLW, shared.stats_SR8, shared.low_SLE, shared.copied_SLR2)
    for sizes_R, expected in (
        ((mine, other), (RankReport(rank=1, step=4, experts_ms=1.5),)),
        ((mine, replace(other, experts_us=0)), ()),
    ):
        raw = RawPass(**{name: getattr(told, name) for name in told.__struct_fields__}
                      | {"agreed": Agreed(policy=Policy(epoch=0), sizes_R=sizes_R)})  # fmt: skip
        record = build(raw, *(np.zeros_like(part[0]) for part in parts), sizes, 0, 1.0)
        assert record.reports == expected
