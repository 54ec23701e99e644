"""Small synthetic loads for the tests of traces and of their replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.trace.synthetic import SyntheticLoad, synthetic_passes
from sglang_moelb.trace.types import PASSES, TracedPass
from sglang_moelb.trace.writer import TraceWriter
from sglang_moelb.types import Decision, Lever, Policy, RankReport, Topology

TOPOLOGY = Topology(num_layers=3, num_experts=8, num_ranks=4, topk=2)
LOAD = SyntheticLoad(topology=TOPOLOGY, num_passes=6, tokens_per_rank=50, seed=3)
FIRST = PASSES.file_name(0, 0)


def writer(folder: Path, max_file_bytes: int = 1 << 20, rank: int = 0) -> TraceWriter:
    """A writer of TOPOLOGY with the default configuration."""
    return TraceWriter(
        folder, topology=TOPOLOGY, rank=rank, config=Config(), max_file_bytes=max_file_bytes
    )


def rich_pass(step: int = 0) -> TracedPass:
    """A pass in which nothing is 0, "" or the default."""
    traced = next(synthetic_passes(replace(LOAD, seed=step, protected_share=0.2)))
    policy = Policy(epoch=7, lever=Lever.DROP, capacity_factor=1.1, renormalise=True, reason="why")
    record = replace(
        traced.record,
        step=step,
        policy=policy,
        gate_reason="too small",
        rank=2,
        num_refused_tokens_R=np.arange(1, 5),
        lost_mass=0.1 + 0.2,
        moved_mass=1 / 3,
        num_dropped_rows=5,
        num_added_rows=6,
        experts_ms_L=np.array([0.1, 0.2, 0.30000000000000004]),
        layer_ms_L=np.array([1.1, 1.2, 1.3]),
        balance_ms=0.01,
        step_ms=12.3,
        low_rows_LR=np.arange(12).reshape(3, 4),
        num_copies_LR=np.arange(1, 13).reshape(3, 4),
        reports=(RankReport(rank=1, step=3, experts_ms=1.25), RankReport(2, 4, 0.5)),
    )
    decision = Decision(
        lever=Lever.DROP, reason="drop pays", expected_gain=0.1, expected_lost_mass_share=0.02
    )
    return replace(traced, record=record, decision=decision, now_s=1e5 / 3, num_missed=4)


def assert_same(one: TracedPass, other: TracedPass) -> None:
    """Every field equal, to the last bit."""
    for a, b in ((one, other), (one.record, other.record)):
        for name in a.__dataclass_fields__:
            if name == "record":
                continue
            left, right = getattr(a, name), getattr(b, name)
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype, name
                assert left.shape == right.shape, name
                assert (left == right).all(), name
            else:
                assert left == right, name
