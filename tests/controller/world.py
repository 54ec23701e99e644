"""A small simulated server that makes records: what a lever does there is computed row by row.

Its experts take FIXED_MS + MS_PER_ROW * rows on the slowest rank, its step REST_MS more. Dropped
rows lose DROPPED_MASS of a mean row each.

Shape letters: L MoE layers, E logical experts, R ranks, M modalities (text, vision).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.types import (
    Effects,
    IntArray,
    Lever,
    LeverScore,
    Observation,
    Phase,
    Policy,
    StepRecord,
    Topology,
    Verdict,
)

JUDGING = {"enabled": True}  # of a configuration with the verdict
TOPOLOGY = Topology(num_layers=2, num_experts=8, num_ranks=4, topk=2)
FIXED_MS, MS_PER_ROW, REST_MS, OWN_MS = 0.5, 0.001, 10.0, 0.01
DROPPED_MASS = 0.2

BALANCED = (1000,) * 8
SKEWED = (2500, 2300, 700, 500, 600, 400, 500, 500)  # rank 0 has 2.4 times the mean
MILD = (1050, 1050, 1000, 1000, 950, 950, 1000, 1000)


def config(**controller: float) -> Config:
    """Mode auto, a generous quality budget, no gate on tokens, no copies, and the given limits."""
    tree = {
        "mode": "auto",
        "capacity": {"min_batch_tokens": 0},
        "replicate": {"slots": 0},
        "controller": {"quality_budget": 0.2, **controller},
    }
    return merge(Config(), tree)


def in_mode(mode: str, **controller: float) -> Config:
    """`config` in another mode."""
    return merge(config(**controller), {"mode": mode})


def judged(mode: str = "observe", **controller: float) -> Config:
    """The world's configuration, with the verdict."""
    return merge(in_mode(mode, **controller), {"verdict": JUDGING})


def score(verdict: Verdict, lever: Lever) -> LeverScore:
    """What the verdict says of a lever."""
    return next(one for one in verdict.scores if one.lever is lever)


def record(
    load_E: Sequence[int],
    *,
    policy: Policy | None = None,
    step: int = 0,
    phase: Phase = "prefill",
    scale: int = 1,
    vision: float = 0.5,
    topology: Topology = TOPOLOGY,
) -> StepRecord:
    """The record of a pass with `load_E` rows in each layer, under `policy`, seen by rank 0."""
    policy = policy or Policy(epoch=0)
    rows_E = np.array(load_E, dtype=np.int64) * scale
    vision_E = (rows_E * vision).astype(np.int64)
    rows_LEM = np.tile(np.stack([rows_E - vision_E, vision_E], axis=1), (topology.num_layers, 1, 1))
    rows_R = rows_E.reshape(topology.num_ranks, -1).sum(axis=1)
    after_R = after_lever(rows_R, policy)
    num_tokens_R = np.full(topology.num_ranks, rows_E.sum() // topology.topk // topology.num_ranks)
    num_dropped = int((rows_R - np.minimum(rows_R, after_R)).sum())
    routed_mass = float(num_tokens_R.sum() * topology.num_layers)
    experts_L = np.full(topology.num_layers, FIXED_MS + MS_PER_ROW * after_R[0])
    slowest_ms = FIXED_MS + MS_PER_ROW * float(after_R.max())
    lost_share = DROPPED_MASS * num_dropped / max(int(rows_E.sum()), 1)
    return StepRecord(
        step=step,
        policy=policy,
        phase=phase,
        gate_reason="",
        rank=0,
        num_tokens_R=num_tokens_R,
        num_vision_tokens_R=(num_tokens_R * vision).astype(np.int64),
        num_protected_tokens_R=np.zeros(topology.num_ranks, dtype=np.int64),
        num_refused_tokens_R=np.zeros(topology.num_ranks, dtype=np.int64),
        rows_LEM=rows_LEM,
        rows_after_LR=np.tile(after_R, (topology.num_layers, 1)),
        routed_mass=routed_mass,
        lost_mass=routed_mass * lost_share,
        moved_mass=0.0,
        num_dropped_rows=num_dropped * topology.num_layers,
        num_added_rows=0,
        experts_ms_L=experts_L,
        layer_ms_L=experts_L + 1.0,
        balance_ms=OWN_MS * topology.num_layers,
        step_ms=REST_MS + topology.num_layers * (slowest_ms + OWN_MS),
    )


def after_lever(rows_R: IntArray, policy: Policy) -> IntArray:
    """Rows left on each rank at device level: cut to capacity, or filled up to it as well."""
    capacity = int(policy.capacity_factor * rows_R.sum() / len(rows_R))
    if policy.lever == Lever.DROP:
        return np.minimum(rows_R, capacity)
    if policy.lever == Lever.EXPAND:
        return np.full_like(rows_R, capacity)
    return rows_R


def serve(controller: Controller, passes: Sequence[Sequence[int]]) -> list[Effects]:
    """Feed passes to the controller, each under the policy that it gave after the one before."""
    return [
        controller.step(
            Observation(record=record(rows_E, policy=controller.policy, step=i), now_s=0.1 * i)
        )
        for i, rows_E in enumerate(passes)
    ]


def observe(controller: Controller, records: Iterable[StepRecord]) -> list[Effects]:
    """Feed ready records to the controller."""
    return [controller.step(Observation(record=r, now_s=0.1 * i)) for i, r in enumerate(records)]


def num_moves(effects: Sequence[Effects]) -> int:
    """How often the lever changed."""
    levers = [e.policy.lever for e in effects]
    return sum(a != b for a, b in pairwise(levers))


def without_times(one: StepRecord) -> StepRecord:
    """The record as it comes where no time is known yet."""
    return replace(one, step_ms=0.0, experts_ms_L=np.zeros_like(one.experts_ms_L))
