"""The verdict on a trace is that of the live server, and following it does what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.verdict import line
from sglang_moelb.replay.arms import Options
from sglang_moelb.replay.cli import replay
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.judged import timed, verdict_on
from sglang_moelb.replay.run import replay_trace, topology_at
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace, synthetic_passes
from sglang_moelb.types import Lever, LeverScore, Observation, StepRecord, Topology, Verdict
from tests.controller import world as simulated
from tests.replay.world import serve_and_trace

SIZES = [
    Topology(num_layers=6, num_experts=64, num_ranks=4, topk=8),
    Topology(num_layers=6, num_experts=16, num_ranks=8, topk=2),
]
FACTOR = 1.0
JUDGING = merge(
    Config(),
    {
        "mode": "observe",
        "capacity": {"factor": FACTOR},
        "controller": {"quality_budget": 1.0},
        "verdict": {"enabled": True},
    },
)
# None of the benchmark's loads: power laws whose hot spots drift, of several sizes.
OTHER_LOADS = [
    SyntheticLoad(
        topology=topology,
        num_passes=60,
        tokens_per_rank=tokens,
        alpha=alpha,
        drift=drift,
        seed=seed,
    )
    for topology in SIZES
    for seed, (tokens, alpha, drift) in enumerate(
        [(32768, 0.9, 0.3), (16384, 1.5, 0.1), (16384, 0.5, 0.0), (8192, 1.2, 0.5),
         (32768, 0.0, 0.1), (1024, 1.5, 0.1), (700, 1.2, 0.0)]
    )
]  # fmt: skip


def observed(load: SyntheticLoad) -> Verdict:
    """The verdict of a server in observe after the passes of `load`, at the default machine."""
    controller, now_s = Controller(JUDGING, load.topology), 0.0
    for traced in synthetic_passes(load):
        record = timed(traced.record, Machine())
        now_s += max(record.step_ms / 1e3, 0.5)
        controller.step(Observation(record=record, now_s=now_s))
    verdict = controller.verdict()
    assert verdict is not None
    return verdict


def of_drop(verdict: Verdict) -> LeverScore:
    return next(one for one in verdict.scores if one.lever is Lever.DROP)


def effect(folder: Path, load: SyntheticLoad) -> float:
    """Share of the steps that drop saves by the simulator, its own time counted."""
    synthesise_trace(folder, load)
    trace = open_trace(folder)
    options = Options(
        config=JUDGING, topology=topology_at(trace, None), machine=Machine(), factor=FACTOR
    )
    scores = {one.name: one.step_ms_P.sum() for one in
              replay_trace(trace, ("none", "drop"), options).scores}  # fmt: skip
    return float(1.0 - scores["drop"] / scores["none"])


@pytest.mark.parametrize(
    "load", OTHER_LOADS, ids=lambda o: f"{o.topology.num_ranks}-{o.tokens_per_rank}-{o.alpha}"
)
def test_following_the_verdict_has_the_sign_that_it_foretold(
    tmp_path: Path, load: SyntheticLoad
) -> None:
    verdict, true = observed(load), effect(tmp_path / "trace", load)
    drop = of_drop(verdict)
    if abs(true) > 0.02:
        assert np.sign(drop.gain) == np.sign(true), (true, drop)
    assert drop.gain_low - 0.005 <= true <= drop.gain_high + 0.005
    if verdict.lever is Lever.DROP:
        assert true > 0.02


def test_the_other_loads_are_of_both_kinds() -> None:
    levers = [observed(load).lever for load in OTHER_LOADS]
    assert 4 <= sum(lever is Lever.NONE for lever in levers) <= len(levers) - 4


def test_a_trace_has_the_verdict_of_its_run(tmp_path: Path) -> None:
    config = merge(simulated.in_mode("observe"), {"verdict": {"enabled": True}})
    loads = [simulated.SKEWED if i % 8 else simulated.BALANCED for i in range(400)]
    changes = {200: merge(config, {"controller": {"min_gain": 0.01}})}
    serve_and_trace(tmp_path, config, loads, changes)
    live = Controller(config, simulated.TOPOLOGY)
    for step, load_E in enumerate(loads):
        if step in changes:
            live.reconfigure(changes[step])
        record = simulated.record(load_E, policy=live.policy, step=step)
        live.step(Observation(record=record, now_s=0.1 * step))
    expected = live.verdict()
    assert expected is not None
    assert expected.scores
    assert verdict_on(open_trace(tmp_path), Machine()) == expected


def test_a_trace_without_times_gets_those_of_the_machine(tmp_path: Path) -> None:
    synthesise_trace(tmp_path, replace(OTHER_LOADS[0], num_passes=200))
    trace = open_trace(tmp_path)
    slow, none = (verdict_on(trace, Machine(ms_per_row=ms)) for ms in (1e-3, 0.0))
    assert of_drop(slow).gain > 0.05
    assert of_drop(none).gain <= 0.0


def test_a_pass_without_tokens_is_timed_without_fault() -> None:
    empty: StepRecord = simulated.record((0,) * 8)
    assert timed(empty, Machine()).step_ms > 0.0


def test_the_command_prints_the_line_of_the_log(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(replay)
    folder = tmp_path / "trace"
    synthesise_trace(folder, replace(OTHER_LOADS[0], num_passes=40))
    told = CliRunner().invoke(app, [str(folder), "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    expected = line(verdict_on(open_trace(folder), Machine()))
    assert expected in " ".join(told.output.split())
