"""Traces of a live server: tokens agree with counts, while written and after kill -9."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from sglang_moelb.replay.controlled import decide_again
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.tokens import open_tokens
from sglang_moelb.types import Lever

from .conftest import Serve, Server
from .talk import (
    CROWD_IMAGE,
    IMAGE,
    NUM_EXPERTS,
    NUM_RANKS,
    OBSERVE,
    TEXT,
    TWO_IMAGES,
    change,
    say_together,
    status,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
EVERY = 2
MOST_MS = 60_000.0


def ask(server: Server) -> None:
    say_together(server, (IMAGE, TEXT, CROWD_IMAGE, TWO_IMAGES))


def agree(folder: Path) -> int:
    """How many passes all ranks sampled; their tokens are the counts of each source rank."""
    passes = {traced.record.step: traced for traced in open_trace(folder).passes()}
    prefills = [step for step, one in passes.items() if one.record.phase == "prefill"]
    num_sampled = 0
    for tokens_R in zip(
        *(open_tokens(folder, rank).passes() for rank in range(NUM_RANKS)), strict=False
    ):
        (step,) = {tokens.step for tokens in tokens_R}
        if step not in passes:  # the controller is still at it
            continue
        traced = passes[step]
        rows_LREM = np.stack([tokens.rows_LEM(NUM_EXPERTS) for tokens in tokens_R], axis=1)
        assert (rows_LREM == traced.rows_LREM).all(), step
        assert prefills.index(step) == EVERY * num_sampled
        num_vision = [int(tokens.is_vision_T.sum()) for tokens in tokens_R]
        assert num_vision == traced.record.num_vision_tokens_R.tolist()
        num_sampled += 1
    return num_sampled


def assert_other_ranks_told_their_times(folder: Path) -> None:
    """The rank of the controller learns what experts took on each of the others, pass by pass."""
    traced = list(open_trace(folder).passes())
    untouched = {
        one.record.step
        for one in traced
        if one.record.phase == "prefill" and one.record.policy.lever is Lever.NONE
    }
    told = [(one.record.step, report) for one in traced for report in one.record.reports]
    assert {report.rank for _, report in told} == set(range(1, NUM_RANKS))
    for step, report in told:
        assert report.step in untouched
        assert report.step < step
        assert 0.0 < report.experts_ms < MOST_MS
    reports = {report for _, report in told}  # each is repeated until there is another
    assert len({(report.rank, report.step) for report in reports}) == len(reports)


def test_tokens_agree_with_counts_while_written_and_after_kill_9(
    serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "trace"
    server = serve("vl", *OBSERVE, "--moelb-trace", str(folder), "--moelb-trace-tokens", str(EVERY))
    ask(server)
    until(lambda: folder.is_dir() and agree(folder) > 0)
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    ask(server)
    num_prefills = status(server)["totals"]["num_prefill_passes"]
    until(lambda: agree(folder) == (num_prefills + EVERY - 1) // EVERY)
    assert {"none", "drop"} == {tokens.lever for tokens in open_tokens(folder).passes()}
    assert status(server)["trace_tokens"] == "running"
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert agree(folder) == (num_prefills + EVERY - 1) // EVERY
    trace = open_trace(folder)
    assert len([one for one in trace.passes() if one.record.phase == "prefill"]) == num_prefills
    assert_other_ranks_told_their_times(folder)
    again = decide_again(trace)
    assert again.num_same == again.num_decisions > 0, again.first_difference
