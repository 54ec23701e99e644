"""A simulated server under a schedule of changing loads, in which every lever does what it does.

Routings are drawn once a phase and come in turn. Time is that of the replay's machine (4 H100): the
experts of the slowest rank, exchange and the rest by tokens, and a lever's own time in each layer.
That is what drop was measured to take, 0.118 ms at 16,384 tokens a rank and 0.944 at 1,024, and for
levers that were not measured in a server the same and a little more. Copies that are not hidden
take `exposed_ms` a layer.

Shape letters: L MoE layers, E logical experts, R ranks, P phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from sglang_moelb.config import Config, policy_of
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.controller.project_downgrade import low_ranks
from sglang_moelb.replay.cost import Machine
from sglang_moelb.types import IntArray, Lever, Observation, Policy, StepRecord, Topology
from sglang_moelb.words import LEVERS

TOPOLOGY = Topology(num_layers=4, num_experts=128, num_ranks=4, topk=8)
MACHINE = Machine()
NUM_ROUTINGS = 8
LARGE, TINY = 16384, 1024  # tokens a rank
OWN_MS = {  # a layer, of large and of tiny passes
    Lever.NONE: (0.01, 0.15),
    Lever.EXPAND: (0.49, 1.3),
    Lever.DROP: (0.118, 0.944),
    Lever.DOWNGRADE: (0.14, 1.0),
    Lever.REPLICATE: (0.15, 1.1),
}
DROPPED_MASS = 0.5  # of a mean row's


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One load: the hot rank, another in each layer, has `skew` times the mean rows."""

    name: str
    num_passes: int = 300
    tokens: int = LARGE
    skew: float = 1.0
    vision: float = 0.3  # of the rows
    seed: int = 0


PHASES = (
    Phase(name="balanced"),
    Phase(name="skewed", skew=2.0),
    Phase(name="tiny batches", tokens=TINY, skew=2.0),
    Phase(name="vision-heavy", skew=3.0, vision=0.9),
    Phase(name="text-only", skew=1.5, vision=0.0),
    Phase(name="balanced again", skew=1.05),
)


@lru_cache(maxsize=256)
def routing(phase: Phase, number: int) -> tuple[IntArray, IntArray]:
    """Rows [L, E] and the vision rows among them of one of a phase's passes."""
    rng = np.random.default_rng([phase.seed, number])
    num_ranks, size = TOPOLOGY.num_ranks, TOPOLOGY.experts_per_rank
    inside_LRe = rng.gamma(4.0, size=(TOPOLOGY.num_layers, num_ranks, size))
    inside_LRe /= inside_LRe.sum(axis=2, keepdims=True)
    share_LR = np.full((TOPOLOGY.num_layers, num_ranks), (num_ranks - phase.skew) / 3.0)
    hot_L = (np.arange(TOPOLOGY.num_layers) + number) % num_ranks
    share_LR[np.arange(TOPOLOGY.num_layers), hot_L] = phase.skew
    share_LE = (inside_LRe * share_LR[:, :, None]).reshape(TOPOLOGY.num_layers, -1) / num_ranks
    rows_LE = rng.multinomial(phase.tokens * num_ranks * TOPOLOGY.topk, share_LE)
    return rows_LE, (rows_LE * phase.vision).astype(np.int64)


@lru_cache(maxsize=1024)
def copied(
    phase: Phase, number: int, num_slots: int, costs: CopyCosts
) -> tuple[IntArray, IntArray]:
    """Rows and copies of each rank, [L, R], as the planner plans them."""
    rows_LE, _ = routing(phase, number)
    rows_LRE = np.zeros((TOPOLOGY.num_layers, TOPOLOGY.num_ranks, TOPOLOGY.num_experts), np.int64)
    rows_LRE[:, 0] = rows_LE
    plans = [place_replicas(rows_RE, num_slots=num_slots, costs=costs) for rows_RE in rows_LRE]
    copies = [(plan.slots_RS >= 0).sum(axis=1) for plan in plans]
    return np.stack([plan.rows_R for plan in plans]), np.stack(copies)


@dataclass(kw_only=True)
class Server:
    """Passes under a controller's policies; sums of milliseconds and levers, by phase."""

    config: Config
    exposed_ms: float = 0.0
    ms_P: list[float] = field(default_factory=list)
    levers_P: list[list[Lever]] = field(default_factory=list)
    reasons_P: list[list[str]] = field(default_factory=list)

    def run(self, phases: Sequence[Phase]) -> Server:
        """Serve all phases, one after the other."""
        controller = Controller(self.config, TOPOLOGY)
        now_s, step = 0.0, 0
        for phase in phases:
            levers, reasons, took_ms = [], [], 0.0
            for number in range(phase.num_passes):
                one = self.record(phase, number % NUM_ROUTINGS, controller.policy, step)
                levers.append(one.used_lever)
                reasons.append(controller.policy.reason)
                took_ms += one.step_ms
                now_s += one.step_ms / 1e3
                step += 1
                if step >= 4 and step % 5:  # as the server times its layers
                    one = replace(one, experts_ms_L=np.zeros(TOPOLOGY.num_layers))
                controller.step(Observation(record=one, now_s=now_s))
            self.ms_P.append(took_ms)
            self.levers_P.append(levers)
            self.reasons_P.append(reasons)
        return self

    def record(self, phase: Phase, number: int, policy: Policy, step: int) -> StepRecord:
        """One pass and its times, seen by rank 0."""
        rows_LE, vision_LE = routing(phase, number)
        shape = (TOPOLOGY.num_layers, TOPOLOGY.num_ranks, -1)
        rows_LR = rows_LE.reshape(shape).sum(axis=2)
        vision_LR = vision_LE.reshape(shape).sum(axis=2)
        after_LR, low_LR, copies_LR = rows_LR, None, None
        capacity = int(policy.capacity_factor * rows_LE[0].sum() / TOPOLOGY.num_ranks)
        if policy.lever is Lever.DROP:
            after_LR = np.minimum(rows_LR, capacity)
        elif policy.lever is Lever.EXPAND:
            after_LR = np.full_like(rows_LR, capacity)
        elif policy.lever is Lever.DOWNGRADE:
            low_LR = rows_LR * low_ranks(rows_LR, vision_LR, policy)
        elif policy.lever is Lever.REPLICATE:
            costs = CopyCosts(min_rows=policy.min_copy_rows)
            after_LR, copies_LR = copied(phase, number, self.config.replicate.slots, costs)
        time_LR = after_LR if low_LR is None else LowCost().effective(rows_LR, low_LR, TOPOLOGY)
        experts_LR = MACHINE.fixed_ms + MACHINE.ms_per_row * time_LR
        if copies_LR is not None:
            experts_LR = experts_LR + self.exposed_ms * (copies_LR > 0)
        own_ms = OWN_MS[policy.lever][phase.tokens == TINY] * TOPOLOGY.num_layers
        by_token = MACHINE.exchange_ms_per_token + MACHINE.rest_ms_per_token
        rest_ms = by_token * phase.tokens * TOPOLOGY.num_layers
        num_dropped = int(np.maximum(rows_LR - after_LR, 0).sum()) * policy.lever.cuts
        tokens_R = np.full(TOPOLOGY.num_ranks, phase.tokens)
        routed_mass = float(tokens_R.sum() * TOPOLOGY.num_layers)
        return StepRecord(
            step=step,
            policy=policy,
            phase="prefill",
            gate_reason="",
            rank=0,
            num_tokens_R=tokens_R,
            num_vision_tokens_R=(tokens_R * phase.vision).astype(np.int64),
            num_protected_tokens_R=np.zeros_like(tokens_R),
            num_refused_tokens_R=np.zeros_like(tokens_R),
            rows_LEM=np.stack([rows_LE - vision_LE, vision_LE], axis=2),
            rows_after_LR=after_LR,
            routed_mass=routed_mass,
            lost_mass=routed_mass * DROPPED_MASS * num_dropped / int(rows_LE.sum()),
            moved_mass=0.0,
            num_dropped_rows=num_dropped,
            num_added_rows=0,
            experts_ms_L=experts_LR[:, 0],
            layer_ms_L=experts_LR.max(axis=1),
            balance_ms=own_ms,
            step_ms=float(experts_LR.max(axis=1).sum()) + rest_ms + own_ms,
            low_rows_LR=low_LR,
            num_copies_LR=copies_LR,
        )


def in_mode_ms(config: Config, mode: str, phase: Phase, *, exposed_ms: float = 0.0) -> float:
    """Time of a phase with the lever of `mode` in every pass; inf where that spends a budget."""
    policy = policy_of(config, LEVERS.get(mode, Lever.NONE), epoch=0, reason="")
    server = Server(config=config, exposed_ms=exposed_ms)
    passes = [server.record(phase, number, policy, number) for number in range(NUM_ROUTINGS)]
    lost_share = sum(one.lost_mass for one in passes) / sum(one.routed_mass for one in passes)
    if lost_share > config.controller.quality_budget:
        return np.inf
    return sum(one.step_ms for one in passes) * phase.num_passes / NUM_ROUTINGS
