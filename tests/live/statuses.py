"""Statuses of any shape, made by the server's own ledger from seeded loads.

Shape letters: L MoE layers, R ranks, E logical experts, M modalities.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from typing import Any

import msgspec
import numpy as np

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.shown_pass import ShownPass
from sglang_moelb.ep.status import NUM_RECENT, Ledger
from sglang_moelb.types import (
    Decision,
    Effects,
    Lever,
    LoadEstimate,
    Policy,
    StepRecord,
    Topology,
)

MEMORY = {
    "staging_bytes": 1_208_000_000,
    "resident_bytes": 3_400_000_000,
    "replicas_bytes": 0,
    "deepep_bytes": 512_000_000,
    "kv_tokens_lost": 12_345,
}
VERDICT = {
    "text": "turn on drop: expected gain 5.1 % (95 %: 3.9 to 6.2 %) of throughput for 1.2 % of "
    "gate mass, over the last 1,024 passes"
}
REASONS = {
    Lever.NONE: "balanced: best lever drop would save 0.8 % of a step, below min_gain 2.0 %",
    Lever.DROP: "keeping drop: drop saves 5.3 % of a step and loses 1.2 % of gate mass",
    Lever.EXPAND: "expand saves 4.1 % of a step and loses 0.4 % of gate mass",
}
EXPERTS_PER_RANK = 4
TOKENS_PER_RANK = 4096
TOPK = 8


class Recent:
    """What a server keeps of the last passes, and the pass that is shown of them."""

    def __init__(self, topology: Topology) -> None:
        self.shown = ShownPass(topology, NUM_RECENT)
        self.rows: deque[dict[str, Any]] = deque(maxlen=NUM_RECENT)

    def add(self, record: StepRecord, ledger: Ledger) -> None:
        """After the ledger has counted the pass."""
        self.rows.append(ledger.newest())
        self.shown.add(record)


def status(
    *,
    num_ranks: int = 2,
    num_layers: int = 4,
    num_passes: int = 70,
    state: str = "running",
    idle_rank: bool = False,
    skew: float = 0.35,
    factor: float = 1.25,
    spent_share: float = 0.012,
    seed: int = 0,
    extras: bool = True,
) -> dict[str, Any]:
    """A status as `/moelb/status` answers it, after `num_passes` prefill passes."""
    topology = Topology(
        num_layers=num_layers,
        num_experts=num_ranks * EXPERTS_PER_RANK,
        num_ranks=num_ranks,
        topk=TOPK,
    )
    ledger, recent = Ledger(topology), Recent(topology)
    rng = np.random.default_rng(seed)
    hot = _hot_spots(topology, rng, skew)
    policy = Policy(epoch=0)
    for step in range(num_passes):
        lever = (Lever.NONE, Lever.DROP, Lever.DROP, Lever.EXPAND, Lever.DROP)[step // 8 % 5]
        policy = Policy(
            epoch=step // 8, lever=lever, capacity_factor=factor, min_batch_tokens=2048,
            reason=REASONS[lever],
        )  # fmt: skip
        record = _record(topology, policy, step, hot, rng, idle_rank=idle_rank)
        ledger.add(record, _effects(policy))
        recent.add(record, ledger)
    if state in ("dead", "hung"):
        policy = Policy(epoch=policy.epoch, reason=f"controller process is {state}: RuntimeError")
    return {
        "active": True,
        "form": "hook",
        "rank": 0,
        "mode": "auto",
        "config": msgspec.to_builtins(merge(Config(), {"mode": "auto"})),
        "topology": asdict(topology),
        "policy": {**asdict(policy), "lever": policy.lever.name.lower(), "level": "device"},
        "num_passes": 9 * num_passes,
        "seams": {},
        "controller": {
            "state": state,
            "num_passes": num_passes,
            "trace": "off",
            "last_decision": {
                **({"spent_mass_share": spent_share} if num_passes else {}),
                "lever": policy.lever.name.lower(),
                "reason": policy.reason,
                "expected_gain": 0.053,
                "expected_lost_mass_share": 0.012,
            },
        },
        "totals": ledger.totals(),
        "recent": list(recent.rows),
        "heat": recent.shown.heat(),
        "ranks_answering": num_ranks,
        **({"memory": MEMORY, "verdict": VERDICT} if extras else {}),
    }


def _record(
    topology: Topology,
    policy: Policy,
    step: int,
    hot_LE1: np.ndarray,
    rng: np.random.Generator,
    *,
    idle_rank: bool,
) -> StepRecord:
    small = step % 11 == 10
    tokens_R = rng.integers(TOKENS_PER_RANK // 2, TOKENS_PER_RANK, topology.num_ranks)
    if small:
        tokens_R = np.minimum(tokens_R, 16)
    if idle_rank:
        tokens_R[-1] = 0
    drift_LE1 = hot_LE1 * rng.lognormal(0.0, 0.15, hot_LE1.shape)
    total = int(tokens_R.sum()) * TOPK
    rows_LE1 = total * drift_LE1 / drift_LE1.sum(axis=1, keepdims=True)
    rows_LEM = np.concatenate([0.6 * rows_LE1, 0.4 * rows_LE1], axis=2).astype(np.int64)
    if idle_rank:
        rows_LEM[:, -EXPERTS_PER_RANK:] = 0
    before_LR = rows_LEM.sum(axis=2).reshape(topology.num_layers, topology.num_ranks, -1).sum(2)
    acts = policy.lever is not Lever.NONE and not small
    limit = policy.capacity_factor * total / topology.num_ranks
    after_LR = np.minimum(before_LR, limit).astype(np.int64) if acts else before_LR
    lost = float((before_LR - after_LR).sum()) / max(total * topology.num_layers, 1)
    return StepRecord(
        step=9 * step,
        policy=policy,
        phase="prefill",
        gate_reason="" if acts or policy.lever is Lever.NONE else "32 prefill tokens, too small",
        rank=0,
        num_tokens_R=tokens_R,
        num_vision_tokens_R=tokens_R * 2 // 5,
        num_protected_tokens_R=tokens_R // 64,
        num_refused_tokens_R=tokens_R * 0,
        rows_LEM=rows_LEM,
        rows_after_LR=after_LR,
        routed_mass=float(tokens_R.sum()) * topology.num_layers,
        lost_mass=0.4 * lost * float(tokens_R.sum()) * topology.num_layers,
        moved_mass=0.0,
        num_dropped_rows=int((before_LR - after_LR).sum()),
        num_added_rows=0,
        experts_ms_L=np.full(topology.num_layers, 0.4),
        layer_ms_L=np.full(topology.num_layers, 0.7),
        balance_ms=0.04 * topology.num_layers * float(rng.uniform(0.8, 1.2)),
        step_ms=1.1 * topology.num_layers * float(rng.uniform(0.95, 1.1)),
    )


def one_pass(
    topology: Topology, policy: Policy, step: int, *, num_tokens: int
) -> tuple[StepRecord, Effects]:
    """A prefill pass of `num_tokens` on each rank, with what the controller made of it."""
    rng = np.random.default_rng(step)
    hot = np.ones((topology.num_layers, topology.num_experts, 1))
    record = _record(topology, policy, step, hot, rng, idle_rank=False)
    tokens_R = np.full(topology.num_ranks, num_tokens)
    return replace(record, step=step, num_tokens_R=tokens_R), _effects(policy)


def _effects(policy: Policy) -> Effects:
    return Effects(
        policy=policy,
        decision=Decision(
            lever=policy.lever,
            reason=policy.reason,
            expected_gain=0.05,
            expected_lost_mass_share=0.01,
        ),
        estimate=LoadEstimate(
            num_passes=1,
            confidence=1.0,
            balance_L=np.ones(1),
            moe_share=0.5,
            ms_per_row=1.0,
            fixed_ms=0.0,
            spent_mass_share=0.0,
            forecasts=(),
        ),
    )


def _hot_spots(topology: Topology, rng: np.random.Generator, skew: float) -> np.ndarray:
    """Weights of experts [L, E, 1]: noise that grows with the depth, and a few that are hot."""
    depth_L11 = np.linspace(0.3, 1.0, topology.num_layers)[:, None, None]
    noise_LE1 = rng.normal(0.0, skew, (topology.num_layers, topology.num_experts, 1))
    hot_LE1 = rng.random(noise_LE1.shape) < 1 / (6 * EXPERTS_PER_RANK)
    weights: np.ndarray = np.exp(depth_L11 * (noise_LE1 + 1.6 * hot_LE1))
    return weights
