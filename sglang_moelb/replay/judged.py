"""The verdict of the live server on a trace, from the same controller.

Shape letters: P passes, L MoE layers, R EP ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.replay.cost import Machine
from sglang_moelb.trace.reader import Trace
from sglang_moelb.trace.types import ConfigChange
from sglang_moelb.types import Observation, StepRecord, Verdict


def verdict_on(trace: Trace, machine: Machine) -> Verdict:
    """What `--moelb-verdict` would have said after the last pass of the trace.

    Passes without times, as in a synthetic trace, get those of `machine`. Changes of configuration
    in the trace hold as they did, but for the verdict's own knobs. Raises `TraceError`.
    """
    controller = Controller(_judging(trace.config), trace.header.topology)
    for event in trace.events():
        if isinstance(event, ConfigChange):
            controller.reconfigure(_judging(event.config))
            continue
        record = event.record if event.record.step_ms > 0.0 else timed(event.record, machine)
        controller.step(Observation(record=record, now_s=event.now_s))
    verdict = controller.verdict()
    assert verdict is not None, "the verdict is enabled"
    return verdict


def timed(record: StepRecord, machine: Machine) -> StepRecord:
    """The record with the times that `machine` predicts of it."""
    rows_LR = record.rows_after_LR
    max_rows_PL = rows_LR.max(axis=1)[None].astype(np.float64)
    tokens_P = record.num_tokens_R.max(keepdims=True)
    mine_L = rows_LR[:, record.rank].astype(np.float64)
    own_ms = machine.own_ms[record.used_lever] * len(rows_LR)
    return replace(
        record,
        experts_ms_L=machine.fixed_ms + machine.ms_per_row * mine_L,
        layer_ms_L=machine.layer_ms(max_rows_PL, tokens_P)[0],
        balance_ms=own_ms,
        step_ms=float(machine.step_ms(max_rows_PL, tokens_P)[0]) + own_ms,
    )


def _judging(config: Config) -> Config:
    return merge(config, {"verdict": {"enabled": True}})
