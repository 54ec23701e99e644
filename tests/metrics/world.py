"""Records and decisions of every kind, fed to the metrics as a server would, and what they export.

Run as a script in a process of its own (prometheus_client takes its form from the environment when
it is imported): prints the exposition of a server of the sizes given.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.metrics import Metrics
from sglang_moelb.metrics.labels import STATES, TRACES
from sglang_moelb.trace.types import TraceStats
from sglang_moelb.types import (
    Decision,
    Effects,
    Lever,
    LeverForecast,
    LoadEstimate,
    Policy,
    StepRecord,
    Topology,
)

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "dashboards" / "moelb.json"
CONFIG = merge(Config(), {"mode": "auto", "controller": {"quality_budget": 0.04}})
GATE_REASONS = (
    "98 prefill tokens, below min_batch_tokens 100",
    "decode pass: nothing is ever dropped outside prefill",
    "a reason of another version",
)
DECISION_REASONS = (
    "quality budget spent: 5.1 % of gate mass lost over the last 256 prefill passes",
    "quality_budget is 0, so lossy levers are off; raise it to allow them",
    "no prefill pass of at least 2048 tokens seen yet",
    "no time of the experts measured yet, so no gain can be forecast",
    "confidence 0.20 after 3 passes, below 0.45",
    "drop saves 5.0 % of a step and loses 9.0 % of gate mass, but quality_budget 5.0 % allows 4 %",
    "holding drop for 2 more passes (min_dwell_passes) before a change to none",
    "keeping drop: drop saves 5.0 % of a step and loses 1.0 % of gate mass",
    "balanced: best lever drop would save 0.1 % of a step, below min_gain 2.0 %",
    "drop saves 5.0 % of a step and loses 1.0 % of gate mass",
    "mode drop",
    "a reason of another version",
)


def record(
    topology: Topology, lever: Lever = Lever.NONE, gate_reason: str = "", **changes: Any
) -> StepRecord:
    """A prefill pass; rank 0 has twice the rows of the others before the lever, and 3/2 after."""
    num_layers, num_ranks = topology.num_layers, topology.num_ranks
    rows_LEM = np.full((num_layers, topology.num_experts, 2), 4, dtype=np.int64)
    rows_LEM[:, : topology.experts_per_rank] *= 2
    after_LR = rows_LEM.reshape(num_layers, num_ranks, -1).sum(axis=2)
    if lever is not Lever.NONE and not gate_reason:
        after_LR[:, 0] = after_LR[:, 0] * 3 // 4
    made = StepRecord(
        step=0,
        policy=Policy(epoch=3, lever=lever),
        phase="prefill",
        gate_reason=gate_reason,
        rank=0,
        num_tokens_R=np.full(num_ranks, 10, dtype=np.int64),
        num_vision_tokens_R=np.zeros(num_ranks, dtype=np.int64),
        num_protected_tokens_R=np.zeros(num_ranks, dtype=np.int64),
        num_refused_tokens_R=np.zeros(num_ranks, dtype=np.int64),
        rows_LEM=rows_LEM,
        rows_after_LR=after_LR,
        routed_mass=100.0,
        lost_mass=3.0,
        moved_mass=2.0,
        num_dropped_rows=7,
        num_added_rows=5,
        experts_ms_L=np.ones(num_layers),
        layer_ms_L=np.ones(num_layers),
        balance_ms=4.0,
        step_ms=200.0,
    )
    return replace(made, **changes)


def effects(topology: Topology, lever: Lever = Lever.NONE, reason: str = "mode none") -> Effects:
    """What a controller says that trusts its estimate by half."""
    estimate = LoadEstimate(
        num_passes=4,
        confidence=0.5,
        balance_L=np.full(topology.num_layers, 2.0),
        moe_share=0.6,
        ms_per_row=0.01,
        fixed_ms=0.0,
        spent_mass_share=0.03,
        forecasts=tuple(
            LeverForecast(lever=one, balance=1.2, gain=0.1 * one, lost_mass_share=0.01 * one)
            for one in Lever
        ),
    )
    decision = Decision(
        lever=lever, reason=reason, expected_gain=0.1, expected_lost_mass_share=0.01
    )
    return Effects(policy=Policy(epoch=4, lever=lever), decision=decision, estimate=estimate)


@dataclass
class Watched:
    """A controller as far as the metrics ask it."""

    on_state: Any = None
    on_config: Any = None


@dataclass
class Writing:
    """A trace as far as the metrics ask it."""

    stats: TraceStats = field(
        default_factory=lambda: TraceStats(state="running", num_bytes=100, num_passes=1)
    )
    on_written: Any = None


def everything(topology: Topology) -> Iterator[tuple[StepRecord, Effects]]:
    """Passes with every lever, gate and reason that there is."""
    for lever, gate_reason in product(Lever, ("", *GATE_REASONS)):
        yield record(topology, lever, gate_reason), effects(topology, lever)
    for lever, reason in product(Lever, DECISION_REASONS):
        yield record(topology), effects(topology, lever, reason)


def exported(num_layers: int, num_ranks: int) -> str:
    """The exposition of a server of these sizes to which everything has happened."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.metrics.world", str(num_layers), str(num_ranks)],
            cwd=ROOT,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def value(name: str, labels: Mapping[str, str] | None = None) -> float | None:
    """The present value of one series of this process."""
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, dict(labels or {}))


def board_queries() -> list[str]:
    """Every query of the board."""
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def _main() -> None:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    num_layers, num_ranks = (int(word) for word in sys.argv[1:])
    topology = Topology(
        num_layers=num_layers, num_experts=2 * num_ranks, num_ranks=num_ranks, topk=8
    )
    metrics, watched = Metrics(), Watched()
    metrics.watch(watched, CONFIG)  # type: ignore[arg-type]
    for trace in TRACES:
        metrics.follow(trace, Writing())  # type: ignore[arg-type]
    for one, effect in everything(topology):
        metrics.add(one, effect)
    for state in STATES:
        watched.on_state(state)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    sys.stdout.write(generate_latest(registry).decode())


if __name__ == "__main__":
    _main()
