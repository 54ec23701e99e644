"""The pass clock: one step of the controller a pass, from its record to the next policy.

Pure: time, sizes and limits are arguments. Live serving, replay of a trace and the simulator drive
this very class, and the same records give the same policies.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from sglang_moelb.config import Config, policy_of
from sglang_moelb.controller import cost, forecast, load, verdict
from sglang_moelb.controller.copy_cost import HIDDEN
from sglang_moelb.controller.decide import Standing, decide
from sglang_moelb.controller.low_cost import LowCost
from sglang_moelb.controller.own_time import OwnTimes, size_of
from sglang_moelb.controller.project_downgrade import Projection
from sglang_moelb.controller.project_replicate import CopyRule
from sglang_moelb.controller.quality import LossModel, QualityWindow
from sglang_moelb.controller.rank_times import RankTimes, Reports
from sglang_moelb.controller.scoreboard import Scoreboard
from sglang_moelb.types import (
    Decision,
    Effects,
    Lever,
    LeverForecast,
    LoadEstimate,
    Observation,
    Policy,
    StepRecord,
    Topology,
    Verdict,
)

CLOCK_TOLERANCE_S = 1e-6
NUM_NEWEST = 4  # passes that stop a lever which makes them clearly longer


class Controller:
    """Decides the policy of the next pass from the records of the last ones.

    Not thread-safe: `step` and `reconfigure` must be called under one lock. Keeps its records.
    """

    def __init__(self, config: Config, topology: Topology, epoch: int = 0) -> None:
        self._config = config
        self._topology = topology
        self._standing = Standing()
        self._loss = LossModel()
        self._own = OwnTimes()
        self._num_losing = 0  # passes in a row that the lever made clearly longer
        self._low_cost, self._copy_cost = LowCost(), HIDDEN
        self._reports = Reports()
        self._cost = cost.UNMEASURED
        self._quality = QualityWindow(config.controller.quality_window_passes)
        self._estimated_s = -math.inf
        self._board = _board_for(config)
        self._verdict: Verdict | None = None
        self._judge_s = -math.inf
        self._watch(())
        self._estimate = self._estimated()
        self._decision = self._decided()
        self._policy = self._policy_for(epoch)

    @property
    def policy(self) -> Policy:
        """The newest policy."""
        return self._policy

    def step(self, observation: Observation) -> Effects:
        """Take in one pass: load -> forecast -> decide -> policy.

        The epoch grows only when something in the policy other than its reason changes. A pass
        without news (decode, idle, too small for a lever) changes nothing and costs next to
        nothing. Where passes follow each other faster than `controller.interval_ms`, not every one
        brings a forecast.
        """
        record = observation.record
        if record.phase == "prefill":
            self._quality.add(record)
            self._loss = self._loss.updated(record, self._topology)
            entered = self._take(record)
            if entered:
                self._own = self._own.updated(record, self._loads[-1].num_tokens)
                self._num_losing = self._num_losing + 1 if self._lost_time(self._loads[-1]) else 0
                self._learn((RankTimes.own(record),))
            if record.reports:
                self._learn(self._reports.take(record.reports, [p.record for p in self._loads]))
            if (entered or record.lost_mass) and self._is_due(observation.now_s):
                self._estimated_s = observation.now_s
                self._estimate = self._estimated()
                self._decision = self._decided()
                self._policy = self._next_policy()
            if self._board:
                self._score(self._board, observation, entered=entered)
        return Effects(
            policy=self._policy,
            decision=self._decision,
            estimate=self._estimate,
            verdict=self._verdict,
        )

    def verdict(self) -> Verdict | None:
        """The verdict on the passes so far; None unless `verdict.enabled`."""
        if not self._board:
            return None
        return verdict.judge(
            self._board,
            estimate=self._estimate,
            config=self._config,
            num_layers=self._topology.num_layers,
        )

    def reconfigure(self, config: Config) -> Policy:
        """Change the configuration while serving; returns the policy to publish at once.

        Its epoch always grows, so that a caller can tell when the change has arrived. What was
        learned is kept: the window is forecast anew where the rules of a lever change, and no dwell
        is waited for. Masses of dropped rows are learned anew when the capacity knobs change.
        """
        if config.capacity != self._config.capacity:
            self._loss = LossModel()
        self._board = self._board_under(config)
        is_projected_anew = _projected_by(config) != _projected_by(self._config)
        self._config = config
        self._quality = self._quality.resized(config.controller.quality_window_passes)
        self._standing = replace(self._standing, dwell_passes=Standing().dwell_passes)
        self._num_losing = 0
        if is_projected_anew:
            # Tens of milliseconds for a full window at 48 layers: not for a change of mode.
            self._watch([past.record for past in self._loads])
        self._estimate = self._estimated()
        self._decision = self._decided()
        self._verdict = self.verdict()
        self._policy = self._policy_for(self._policy.epoch + 1)
        return self._policy

    def _learn(self, times: Iterable[RankTimes]) -> None:
        """What low rows and copies cost."""
        for one in times:
            self._low_cost = self._low_cost.updated(one, self._topology, self._cost)
            self._copy_cost = self._copy_cost.updated(one, self._cost)

    def _is_due(self, now_s: float) -> bool:
        """Whether to forecast and decide: the interval is over, or a lever must stop before."""
        limits = self._config.controller
        lever, quality = self._policy.lever, self._quality
        if lever is Lever.DOWNGRADE and quality.low_share > limits.downgrade_budget:
            return True
        if lever.cuts and quality.spent_share > limits.quality_budget:
            return True
        if self._config.mode == "auto" and self._num_losing == NUM_NEWEST:
            return True
        return now_s - self._estimated_s >= limits.interval_ms / 1e3 - CLOCK_TOLERANCE_S

    def _lost_time(self, one: load.PassLoad) -> bool:
        """Whether a lever acted in a pass that it made clearly longer, as far as is known."""
        lever = one.record.used_lever
        if lever is Lever.NONE or self._cost.ms_per_row <= 0.0:
            return False
        spared_ms = self._cost.ms_per_row * (one.slowest_rows - one.slowest_rows_run)
        spared_ms -= self._copy_cost.copy_ms * one.num_copies
        own_ms = self._own.extra_ms(lever, {size_of(one.num_tokens): 1})
        return own_ms - max(spared_ms, 0.0) > forecast.LOSING_SHARE * one.record.step_ms

    def _watch(self, records: Iterable[StepRecord]) -> None:
        num_passes = self._config.controller.window_passes
        self._capacity = policy_of(self._config, Lever.NONE, epoch=0, reason="")
        downgrade = policy_of(self._config, Lever.DOWNGRADE, epoch=0, reason="")
        self._downgrade = downgrade if self._config.downgrade.slots else None
        replicate = policy_of(self._config, Lever.REPLICATE, epoch=0, reason="")
        num_slots = self._config.replicate.slots
        self._copies = CopyRule(policy=replicate, num_slots=num_slots) if num_slots else None
        self._loads: deque[load.PassLoad] = deque(maxlen=num_passes)
        self._projections: deque[tuple[Projection, ...]] = deque(maxlen=num_passes)
        for record in records:
            self._take(record)

    def _take(self, record: StepRecord) -> bool:
        """Whether the pass entered the window."""
        if not load.enters(record, min_batch_tokens=self._config.capacity.min_batch_tokens):
            return False
        one = load.load_of(record, self._topology, self._low_cost)
        self._loads.append(one)
        projected = forecast.project(
            one, self._topology, self._capacity, self._downgrade, self._low_cost, self._copies
        )
        self._projections.append(projected)
        dwell_passes = self._standing.dwell_passes + 1
        self._standing = replace(self._standing, dwell_passes=dwell_passes)
        return True

    def _board_under(self, config: Config) -> Scoreboard | None:
        board = self._board
        if not board or not config.verdict.enabled:
            return _board_for(config)
        if _rules(config) != _rules(self._config):
            board = board.cleared()  # its samples were forecast under other rules
        board.resize(config.verdict.window_passes)
        return board

    def _score(self, board: Scoreboard, observation: Observation, *, entered: bool) -> None:
        """Count the pass for the verdict, and make that anew where it is due."""
        now_s = observation.now_s
        board.see(observation.record, entered=entered)
        if self._estimated_s == now_s:  # just forecast
            forecasts = partial(self._forecasts, cost_model=self._cost, own=OwnTimes())
            board.sample(
                self._loads,
                self._projections,
                cost=self._cost,
                steps_of=self._steps,
                forecast=forecasts,
                now_s=now_s,
            )
        if now_s >= self._judge_s:
            self._judge_s = now_s + min(verdict.TELL_S, self._config.verdict.log_interval_s)
            self._verdict = self.verdict()

    def _estimated(self) -> LoadEstimate:
        loads = tuple(self._loads)
        self._cost = model = cost.fit(loads, self._cost, self._reports.by_step)
        first = load.first_of_new(loads)
        loads, projections = loads[first:], tuple(self._projections)[first:]
        times = self._steps(loads)
        return LoadEstimate(
            num_passes=len(loads),
            confidence=load.confidence(loads),
            balance_L=load.mean_balance(loads, self._topology.num_layers),
            moe_share=times.moe_share,
            ms_per_row=model.ms_per_row,
            fixed_ms=model.fixed_ms,
            spent_mass_share=self._quality.spent_share,
            spent_low_share=self._quality.low_share,
            forecasts=self._forecasts(
                loads,
                projections,
                times,
                cost_model=model,
                own=self._own,
                num_newest=NUM_NEWEST,
            ),
        )

    def _steps(self, loads: Sequence[load.PassLoad]) -> cost.StepTimes:
        return cost.step_times(loads, self._cost, copy_ms=self._copy_cost.copy_ms)

    def _forecasts(
        self,
        loads: Sequence[load.PassLoad],
        projections: Sequence[tuple[Projection, ...]],
        times: cost.StepTimes,
        *,
        cost_model: cost.CostModel,
        own: OwnTimes,
        num_newest: int = 0,
    ) -> tuple[LeverForecast, ...]:
        return forecast.forecast(
            loads,
            projections,
            cost=cost_model,
            times=times,
            loss=self._loss,
            own=own,
            capacity=self._capacity,
            copy_ms=self._copy_cost.copy_ms,
            num_newest=num_newest,
        )

    def _decided(self) -> Decision:
        decision, self._standing = decide(self._estimate, self._config, self._standing)
        return decision

    def _policy_for(self, epoch: int) -> Policy:
        decision = self._decision
        return policy_of(self._config, decision.lever, epoch=epoch, reason=decision.reason)

    def _next_policy(self) -> Policy:
        # without a new configuration, the lever and the reason are all that can change
        changed = self._decision.lever != self._policy.lever
        if changed:
            self._num_losing = 0
        return self._policy_for(self._policy.epoch + int(changed))


def _rules(config: Config) -> tuple[object, ...]:
    return config.capacity, config.downgrade, config.replicate


def _projected_by(config: Config) -> tuple[object, ...]:
    """What the window and its projections depend on."""
    return *_rules(config), config.controller.window_passes


def _board_for(config: Config) -> Scoreboard | None:
    return Scoreboard(config.verdict.window_passes) if config.verdict.enabled else None
