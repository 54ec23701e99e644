"""Counts and traces for the tests of replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from sglang_moelb.config import Config
from sglang_moelb.controller.controller import Controller
from sglang_moelb.replay.types import Counts
from sglang_moelb.trace.types import TracedPass
from sglang_moelb.trace.writer import TraceWriter
from sglang_moelb.types import IntArray, Observation, StepRecord, Topology
from tests.controller import world as simulated


def counts(
    rows_PLE: IntArray | list[list[list[int]]],
    *,
    num_ranks: int,
    num_sources: int = 1,
    vision: float = 0.0,
    num_tokens: int = 10_000,
    protected: int = 0,
    topk: int = 2,
) -> Counts:
    """Counts with these rows on experts, the same from each source."""
    rows = np.array(rows_PLE, dtype=np.int64)
    vision_rows = (rows * vision).astype(np.int64)
    by_modality = np.stack([rows - vision_rows, vision_rows], axis=-1)
    by_source = np.stack([by_modality] * num_sources, axis=2)
    return Counts(
        rows_PLSEM=by_source,
        rows_PLEM=by_source.sum(axis=2),
        num_tokens_PS=np.full((len(rows), num_sources), num_tokens),
        num_protected_P=np.full(len(rows), protected),
        num_refused_P=np.full(len(rows), protected),
        num_ranks=num_ranks,
        topk=topk,
    )


def layer(rows_E: Iterable[int], num_ranks: int, **more: float) -> Counts:
    """Counts of one pass of one layer."""
    return counts([[list(rows_E)]], num_ranks=num_ranks, **more)  # type: ignore[arg-type]


def traced(record: StepRecord, topology: Topology) -> TracedPass:
    """The record as it would be traced: all its rows from rank 0."""
    rows_LREM = np.zeros((topology.num_layers, topology.num_ranks, topology.num_experts, 2), int)
    rows_LREM[:, 0] = record.rows_LEM
    return TracedPass(record=record, rows_LREM=rows_LREM, now_s=0.0)


def serve_and_trace(
    folder: Path, config: Config, loads: list[tuple[int, ...]], changes: dict[int, Config]
) -> None:
    """Serve `loads` in the simulated server of the controller's tests, and trace it.

    The configuration is changed before the passes that `changes` names.
    """
    controller = Controller(config, simulated.TOPOLOGY)
    writer = TraceWriter(folder, topology=simulated.TOPOLOGY, rank=0, config=config)
    for step, load_E in enumerate(loads):
        if step in changes:
            controller.reconfigure(changes[step])
            writer.reconfigure(changes[step])
        record = simulated.record(load_E, policy=controller.policy, step=step)
        effects = controller.step(Observation(record=record, now_s=0.1 * step))
        one = traced(record, simulated.TOPOLOGY)
        writer.add(replace(one, now_s=0.1 * step, decision=effects.decision))
    writer.close()
