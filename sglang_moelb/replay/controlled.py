"""The controller over a trace: as it ran, and as it would have run.

Shape letters: P passes, L MoE layers, R EP ranks, S source ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.quality import DROP_PRIOR, LEVER_PRIOR
from sglang_moelb.hot_config import wants_replicas, without_replicas, without_slots
from sglang_moelb.replay.cost import Machine
from sglang_moelb.replay.lossy import capacity
from sglang_moelb.replay.replicas import replicate
from sglang_moelb.replay.types import Counts, Outcome, ReplayError
from sglang_moelb.trace.reader import Trace
from sglang_moelb.trace.types import ConfigChange
from sglang_moelb.types import (
    IntArray,
    Lever,
    Observation,
    Policy,
    StepRecord,
    Topology,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How many recorded decisions the controller makes again, and the first that it does not."""

    num_decisions: int
    num_same: int
    num_missed: int
    first_difference: str


def decide_again(trace: Trace) -> Fidelity:
    """Drive a controller with the very records of the run and compare what it decides.

    Differences are to be expected only where passes are missing from the trace, or where it does
    not begin with the server.
    """
    first_pass = next(trace.passes(), None)
    if first_pass is None or first_pass.decision is None:
        return Fidelity(num_decisions=0, num_same=0, num_missed=0, first_difference="")
    controller = Controller(trace.config, trace.header.topology)
    num_decisions = num_same = num_missed = 0
    first = ""
    for event in trace.events():
        if isinstance(event, ConfigChange):
            controller.reconfigure(event.config)
            continue
        effects = controller.step(Observation(record=event.record, now_s=event.now_s))
        num_missed += event.num_missed
        if event.decision is None:
            continue
        num_decisions += 1
        num_same += effects.decision == event.decision
        if effects.decision != event.decision and not first:
            first = (
                f"pass {event.record.step}: was {event.decision.reason!r}, "
                f"is {effects.decision.reason!r}"
            )
    return Fidelity(
        num_decisions=num_decisions,
        num_same=num_same,
        num_missed=num_missed,
        first_difference=first,
    )


class Auto:
    """The controller in the loop: its policies act on the passes, and it sees what they do.

    A rule with a memory: passes must come in order. Times come from the machine, lost mass from the
    controller's own prior of a dropped row's mass. Without the lever downgrade, whose times a
    machine cannot tell, and with replicate where the server would have memory for it; copies are
    taken to be hidden. Raises `ReplayError` under rule `macs`.
    """

    def __init__(self, config: Config, topology: Topology, machine: Machine) -> None:
        if config.mode in ("none", "observe"):
            config = merge(config, {"mode": "auto"})
        if config.capacity.rule != "plain":
            raise ReplayError(
                "arm auto: capacity.rule 'macs' needs entropies of tokens, which a trace lacks. "
                "Replay it with rule 'plain' (--config), and see arm macs."
            )
        config = without_slots(config)
        config = config if wants_replicas(config) else without_replicas(config)
        self._controller = Controller(config, topology)
        self._num_slots = config.replicate.slots
        self._topology, self._machine = topology, machine
        self._step, self._now_s = 0, 0.0

    def __call__(self, counts: Counts) -> Outcome:
        """What the controller's policies leave of each pass."""
        left = [self._pass(counts.only(at)) for at in range(len(counts))]
        return Outcome(
            rows_PLR=np.concatenate([one.rows_PLR for one in left]),
            lost_PL=np.concatenate([_lost(one) for one in left]),
            levers_P=np.concatenate([one.levers_P for one in left if one.levers_P is not None]),
        )

    def _pass(self, counts: Counts) -> Outcome:
        policy = self._controller.policy
        gate_reason = ""
        if counts.num_tokens_PS.sum() < policy.min_batch_tokens:
            gate_reason = f"fewer than {policy.min_batch_tokens} tokens"
        lever = Lever.NONE if gate_reason else policy.lever
        if lever is Lever.NONE:
            outcome = Outcome(rows_PLR=counts.rows_PLR, levers_P=np.zeros(1, dtype=np.int64))
        elif lever is Lever.REPLICATE:
            outcome = replicate(
                counts, min_rows=policy.min_copy_rows, num_slots=self._num_slots
            )
        else:
            outcome = capacity(
                counts, lever=lever, factor=policy.capacity_factor, level=policy.level
            )
        record = self._record(counts, outcome, policy, gate_reason)
        self._now_s += record.step_ms / 1e3
        self._step += 1
        self._controller.step(Observation(record=record, now_s=self._now_s))
        return outcome

    def _record(
        self, counts: Counts, outcome: Outcome, policy: Policy, gate_reason: str
    ) -> StepRecord:
        machine, num_ranks = self._machine, self._topology.num_ranks
        rows_LR = outcome.rows_PLR[0]
        max_rows_PL = outcome.rows_PLR.max(axis=2).astype(np.float64)
        own_ms = float(machine.own_step_ms(outcome)[0])
        num_lost, num_rows = int(_lost(outcome).sum()), int(counts.rows_PLEM.sum())
        tokens_R = _dealt(int(counts.num_tokens_PS.sum()), num_ranks)
        lost_share = num_lost / max(num_rows, 1)
        if outcome.lost_PL is not None:
            lost_share *= DROP_PRIOR[policy.metric] * LEVER_PRIOR[policy.lever]
        routed_mass = float(tokens_R.sum() * len(rows_LR))
        layer_ms_L = machine.layer_ms(max_rows_PL, counts.busiest_tokens_P)[0]
        return StepRecord(
            step=self._step,
            policy=policy,
            phase="prefill",
            gate_reason=gate_reason,
            rank=0,
            num_tokens_R=tokens_R,
            num_vision_tokens_R=np.zeros(num_ranks, dtype=np.int64),
            num_protected_tokens_R=_dealt(int(counts.num_protected_P[0]), num_ranks),
            num_refused_tokens_R=_dealt(int(counts.num_refused_P[0]), num_ranks),
            rows_LEM=counts.rows_PLEM[0],
            rows_after_LR=rows_LR,
            routed_mass=routed_mass,
            lost_mass=routed_mass * lost_share,
            moved_mass=0.0,
            num_dropped_rows=num_lost,
            num_added_rows=max(int(rows_LR.sum()) - num_rows + num_lost, 0),
            experts_ms_L=machine.fixed_ms + machine.ms_per_row * rows_LR[:, 0],
            layer_ms_L=layer_ms_L,
            balance_ms=own_ms,
            step_ms=float(machine.step_ms(max_rows_PL, counts.busiest_tokens_P)[0]) + own_ms,
        )


def _lost(outcome: Outcome) -> IntArray:
    if outcome.lost_PL is not None:
        return outcome.lost_PL
    return np.zeros(outcome.rows_PLR.shape[:2], dtype=np.int64)


def _dealt(num: int, num_ranks: int) -> IntArray:
    """`num` dealt evenly, what is left over to the first ranks."""
    dealt_R: IntArray = num // num_ranks + (np.arange(num_ranks) < num % num_ranks)
    return dealt_R
