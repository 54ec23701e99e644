"""What one scheduler process does between the seams: the layer clock and the pass clock joined.

All methods are called by SGLang's serving thread through `ep.points`.

Shape letters: T rows of this rank, K top-k, L MoE layers, R ranks, W width of a layer's row.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any

import msgspec
import torch

from sglang_moelb import hot_config
from sglang_moelb.config import Config, ConfigError
from sglang_moelb.ep.balance import LayerBalancer, LayerInput
from sglang_moelb.ep.clock import mark_on
from sglang_moelb.ep.controller_link import ControllerLink
from sglang_moelb.ep.exchange import Agreement, Exchange, SymmetricExchange
from sglang_moelb.ep.expert_times import REPORTED_PARTS
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.plan import plan_low
from sglang_moelb.ep.memory import MemoryLedger
from sglang_moelb.ep.modality import requests_of
from sglang_moelb.ep.observe import observe
from sglang_moelb.ep.open_pass import PassOpener
from sglang_moelb.ep.passed import num_passed, verify_passed
from sglang_moelb.ep.records import AnyMark, PassLog
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.plan import plan_copies
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.moving import MovingAgreement
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.token_trace import TokenTrace
from sglang_moelb.hot_config import KNOB_PREFIX
from sglang_moelb.types import Lever

logger = logging.getLogger("sglang_moelb")


class Runtime:
    """Drives observe, exchange, plan, apply and record of one rank."""

    def __init__(
        self,
        seat: Seat,
        config: Config,
        agreement: Agreement | MovingAgreement,
        exchange: Exchange | SymmetricExchange,
        controller: ControllerLink | None,
        token_trace: TokenTrace | None = None,
        downgrade: DowngradeLever | None = None,
        replicate: ReplicateLever | None = None,
        memory: MemoryLedger | None = None,
        resident: ResidentExperts | None = None,
    ) -> None:
        self._seat = seat
        self._layer_of_dispatcher = seat.layer_of_dispatcher
        self._config = config
        self._token_trace = token_trace
        every = token_trace.every if token_trace else 0
        self._passes = PassOpener(seat, agreement, controller, sample_every=every)
        self._controller = controller
        self._downgrade = downgrade
        self._replicate = replicate
        self._memory = memory or MemoryLedger()
        self._resident = resident
        self._balancer = LayerBalancer(seat.topology, seat.rank, exchange)
        self._exchange = exchange
        self._normal_log: PassLog | None = None  # if its layers are in DeepEP's normal mode
        self._marks: dict[str, AnyMark] | None = None  # of the layer that is under way
        self._stream: torch.cuda.Stream | None = None  # of the marks
        self._seams_verified = False

    def note_requests(self, forward_batch: Any, batch: Any) -> None:
        """Remember on the batch which runs of its tokens are protected."""
        lengths = forward_batch.extend_seq_lens_cpu
        if lengths is None:
            lengths = [1] * forward_batch.batch_size
        forward_batch.moelb_requests = requests_of(batch, list(lengths))

    def begin_pass(self, forward_batch: Any) -> None:
        """Start to agree with the other ranks on what holds for this pass."""
        self._passes.begin(forward_batch)

    def before_dispatch(self, dispatcher: Any, hidden_states: Any, topk_output: Any) -> Any:
        """Balance one layer; returns `topk_output` itself where nothing changes."""
        topk_output = self._balanced(dispatcher, hidden_states, topk_output)
        if self._resident:
            layer = self._layer_of_dispatcher[id(dispatcher)]
            topk_output = self._resident.physical(layer, topk_output)
        return topk_output

    def _balanced(self, dispatcher: Any, hidden_states: Any, topk_output: Any) -> Any:
        log = self._passes.log or self._passes.opened()
        layer = self._layer_of_dispatcher.get(id(dispatcher))
        if log is None or layer is None:
            return topk_output
        if log is not self._normal_log:  # of one mode in all layers
            if not _is_normal(dispatcher):
                return topk_output
            self._normal_log = log
        if log.timed:
            self._marks, self._stream = {}, log.stream
            log.marks_L.append(self._marks)
            self._mark("dispatch")
        if log.tokens_L is not None:
            log.tokens_L.append((topk_output.topk_ids, topk_output.topk_weights))
        if log.lever is Lever.NONE:
            log.ids_L.append(topk_output.topk_ids)
            return topk_output
        routed = LayerInput(
            layer=layer,
            ids_TK=topk_output.topk_ids,
            weights_TK=topk_output.topk_weights,
            logits_TE=topk_output.router_logits,
            hidden_TD=hidden_states,
            flags_T=self._flags_of(log, hidden_states.shape[0]),
            scoring=self._seat.scoring[layer],
        )
        if log.lever is Lever.DOWNGRADE:
            assert self._downgrade is not None, "the leader's policy needs slots on every rank"
            plan = plan_low(routed, log.agreed.policy, self._seat.topology, self._exchange)
            self._downgrade.prepare(layer, plan.low_E)
            log.plans_L.append(plan)
            self._mark("balanced")
            return topk_output
        if log.lever is Lever.REPLICATE:
            ids_TK = self._replicated(log, routed, dispatcher)
            self._mark("balanced")
            return topk_output._replace(topk_ids=ids_TK)
        outcome = self._balancer.run(routed, log.agreed, log.lever)
        log.outcomes_L.append(outcome)
        self._mark("balanced")
        return topk_output._replace(
            topk_ids=outcome.ids_TC.to(topk_output.topk_ids.dtype), topk_weights=outcome.weights_TC
        )

    def run_experts(self, layer: Any, dispatch_output: Any) -> Any:
        """Rows have arrived: run them under a lever, or None to let SGLang run them."""
        if self._marks is not None:
            self._mark("experts")
        if self._resident:
            return self._resident.run(layer, dispatch_output)
        out = self._downgrade.run(layer, dispatch_output) if self._downgrade else None
        if out is None and self._replicate:
            out = self._replicate.run(layer, dispatch_output)
        return out

    def after_experts(self) -> None:
        """The grouped GEMM is enqueued."""
        if self._marks is not None:
            self._mark("combine")

    def after_combine(self) -> None:
        """The layer is enqueued as a whole."""
        if self._marks is not None:
            self._mark("combined")
            self._marks = None

    def end_pass(self) -> None:
        """Close the pass and hand it to the controller."""
        log = self._passes.close()
        self._normal_log = None
        if log is None:
            return
        if not self._seams_verified:
            verify_passed()
            self._seams_verified = True
            self._memory.log()  # once more, now that DeepEP's buffers are there
        if self._downgrade:
            self._downgrade.forget()
        if self._replicate:
            self._replicate.forget()
        if not (log.ids_L or log.outcomes_L or log.plans_L or log.copies_L):
            return
        gathered = self._gathered(log)
        if log.tokens_L and self._token_trace:
            self._token_trace.add(log, self._flags_of(log, log.tokens_L[0][0].shape[0]))
        if self._controller and gathered:
            self._controller.submit(log, *gathered)
        elif log.timed:
            self._passes.expert_times.add(log.step, log.marks_L)

    def _gathered(self, log: PassLog) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Every rank's counts of all layers `[R, L, W]`, and what a lever did on each, `[R, 8]`.

        Ends in a collective, so every rank comes here; None where no controller wants the counts.
        """
        wanted = self._controller is not None
        if log.lever is Lever.NONE:
            log.observing = mark_on(self._seat.device, log.stream) if wanted else None
            counts_RLW = observe(
                log.ids_L,
                self._flags_of(log, log.ids_L[0].shape[0]),
                self._exchange,
                num_experts=self._seat.topology.num_experts,
                wanted=wanted,
            )
            return None if counts_RLW is None else (counts_RLW, None)
        if log.lever is Lever.DOWNGRADE:  # counted and exchanged with each layer
            counts_L = [plan.counts_RW for plan in log.plans_L]
            return (torch.stack(counts_L, dim=1), None) if wanted else None
        if log.lever is Lever.REPLICATE:
            counts_L = [plan.counts_RW for plan in log.copies_L]
            return (torch.stack(counts_L, dim=1), None) if wanted else None
        stats_8 = torch.stack([outcome.stats_8 for outcome in log.outcomes_L]).sum(dim=0)
        if not wanted:
            self._exchange.offer(stats_8.view(torch.int32))
            return None
        stats_R8 = self._exchange.gather(stats_8.view(torch.int32)).view(torch.int64)
        return torch.stack([outcome.counts_RW for outcome in log.outcomes_L], dim=1), stats_R8

    def _replicated(self, log: PassLog, routed: LayerInput, dispatcher: Any) -> torch.Tensor:
        """Plan and start the copies of a layer; the physical ids of its rows."""
        lever, policy = self._replicate, log.agreed.policy
        assert lever is not None, "the leader's policy needs slots on every rank"
        topology, num_slots = self._seat.topology, lever.num_slots
        plan = plan_copies(routed, policy, topology, self._exchange, num_slots=num_slots)
        log.copies_L.append(plan)
        return lever.prepare(routed.layer, dispatcher, plan, routed.ids_TK)

    def _flags_of(self, log: PassLog, num_rows: int) -> torch.Tensor:
        assert log.flags_T is not None, "only a prefill pass is observed"
        return self._seat.window.of(log.flags_T, num_rows)

    def status(self) -> dict[str, Any]:
        """The state of this rank as plain JSON types; full on the leader only."""
        policy = {**asdict(self._passes.policy), "lever": self._passes.policy.lever.name.lower()}
        answer: dict[str, Any] = {
            "active": True,
            "form": self._seat.form,
            "rank": self._seat.rank,
            "process_id": os.getpid(),
            "mode": self._config.mode,
            "config": msgspec.to_builtins(self._config),
            "topology": asdict(self._seat.topology),
            "policy": {k: v.name.lower() if hasattr(v, "name") else v for k, v in policy.items()},
            "num_passes": self._passes.num_passes,
            "seams": dict(num_passed),
            "memory": self._memory.told(),
            "controller": {"state": "off"},
            "trace_tokens": self._token_trace.stats.state if self._token_trace else "off",
        }
        if self._downgrade:
            answer["downgrade"] = self._downgrade.told()
        if self._replicate:
            answer["replicate"] = self._replicate.told()
        if self._resident and self._resident.mover:
            answer["resident"] = self._resident.mover.told() | self._resident.told()
        if self._controller:
            answer |= self._controller.status()
        return answer

    def take_update(self, update: dict[str, int | float]) -> dict[str, int | float]:
        """Apply the knobs in a state update, all or none; returns what is not ours.

        The numbers come from `hot_config.to_numbers` in the HTTP process, which has validated
        them, or from SGLang's own route for state updates, which has not: wrong ones are handed
        back, and SGLang refuses the update.
        """
        ours = {k[len(KNOB_PREFIX) :]: v for k, v in update.items() if k.startswith(KNOB_PREFIX)}
        if ours:
            try:
                numbers = hot_config.to_numbers(self._config) | ours
                wanted = hot_config.from_numbers(numbers, self._config)
                hot_config.refuse_change(self._config, wanted)
                self._config = wanted
            except ConfigError as error:
                logger.warning("sglang_moelb: a state update was refused: %s", error)
                return update
            if self._controller:
                self._controller.reconfigure(self._config)
        return {k: v for k, v in update.items() if not k.startswith(KNOB_PREFIX)}

    def _mark(self, part: str) -> None:
        if self._marks is not None and (self._controller or part in REPORTED_PARTS):
            self._marks[part] = mark_on(self._seat.device, self._stream)


def _is_normal(dispatcher: Any) -> bool:
    return bool(dispatcher._get_impl().dispatch_mode.name == "NORMAL")
