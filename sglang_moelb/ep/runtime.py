"""What one scheduler process does between the seams: the layer clock and the pass clock joined.

All methods are called by SGLang's serving thread through `ep.points`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch

from sglang_moelb import config as configuration
from sglang_moelb.config import Config, ConfigError
from sglang_moelb.ep import points, records
from sglang_moelb.ep.balance import LayerBalancer, LayerInput
from sglang_moelb.ep.clock import mark_on
from sglang_moelb.ep.controller_thread import ControllerThread, Pending
from sglang_moelb.ep.exchange import Agreed, Agreement, Exchange, Sizes, SymmetricExchange
from sglang_moelb.ep.modality import Requests, RowWindow, requests_of, token_flags
from sglang_moelb.ep.records import LayerLog, PassLog
from sglang_moelb.ep.seams import SEAMS, Form
from sglang_moelb.ep.status import Ledger
from sglang_moelb.types import Lever, Policy, StepRecord, Topology

logger = logging.getLogger("sglang_moelb")

KNOB_PREFIX = "moelb."
UNKNOWN_REQUESTS = Requests(runs=(), phase="prefill")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a runtime sits: the model's sizes, this rank, and what finds a layer again."""

    topology: Topology
    rank: int
    device: torch.device
    window: RowWindow
    layer_of_dispatcher: dict[int, int]
    scoring: tuple[str, ...]  # one a layer
    form: Form


class Runtime:
    """Drives observe, exchange, plan, apply and record of one rank."""

    def __init__(
        self,
        seat: Seat,
        config: Config,
        agreement: Agreement,
        exchange: Exchange | SymmetricExchange,
        controller: ControllerThread | None,
        ledger: Ledger | None,
    ) -> None:
        self._seat = seat
        self._config = config
        self._agreement = agreement
        self._controller = controller
        self._ledger = ledger
        self._balancer = LayerBalancer(seat.topology, seat.rank, exchange)
        self._step = 0
        self._log: PassLog | None = None
        self._flags_T: torch.Tensor | None = None
        self._layer: LayerLog | None = None
        self._policy = Policy(epoch=0)
        self._seams_verified = False
        self._mass_per_token = 1.0  # right for renormalised routers, measured at the first cut

    def note_requests(self, forward_batch: Any, batch: Any) -> None:
        """Remember on the batch which runs of its tokens are protected."""
        lengths = forward_batch.extend_seq_lens_cpu
        if lengths is None:
            lengths = [1] * forward_batch.batch_size
        forward_batch.moelb_requests = requests_of(batch, list(lengths))

    def begin_pass(self, forward_batch: Any) -> None:
        """Agree with the other ranks on what holds for this pass, and flag its tokens."""
        requests = getattr(forward_batch, "moelb_requests", UNKNOWN_REQUESTS)
        start, stop = self._seat.window.bounds(forward_batch.input_ids.shape[0])
        num_tokens = max(min(requests.num_tokens, stop) - start, 0)
        mine = Sizes(
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens if requests.phase == "prefill" else 0,
            num_protected_tokens=requests.num_protected,
            phase=requests.phase,
        )
        wanted = self._controller.policy() if self._controller else self._policy
        agreed = self._agreement.agree(wanted, mine)
        self._policy = agreed.policy
        if agreed.phase == "prefill":
            self._flags_T = token_flags(forward_batch.input_ids, requests)
        reason = gate_reason(agreed)
        self._log = PassLog(
            step=self._step,
            agreed=agreed,
            lever=Lever.NONE if reason else agreed.policy.lever,
            gate_reason=reason,
            begun=mark_on(self._seat.device),
        )
        self._step += 1
        if self._controller:
            self._controller.pass_begun()

    def before_dispatch(self, dispatcher: Any, hidden_states: Any, topk_output: Any) -> Any:
        """Balance one layer; returns `topk_output` itself where nothing changes."""
        layer = self._seat.layer_of_dispatcher.get(id(dispatcher))
        if self._log is None or layer is None or not _is_normal(dispatcher):
            return topk_output
        if self._log.agreed.phase != "prefill":
            # No lever can act, and decode would pay for the exchange with every token. All ranks
            # have agreed on the phase, so all stay out of this layer's exchange together.
            return topk_output
        assert self._flags_T is not None
        begun = mark_on(self._seat.device)
        outcome = self._balancer.run(
            LayerInput(
                layer=layer,
                ids_TK=topk_output.topk_ids,
                weights_TK=topk_output.topk_weights,
                logits_TE=topk_output.router_logits,
                hidden_TD=hidden_states,
                flags_T=self._seat.window.of(self._flags_T, hidden_states.shape[0]),
                scoring=self._seat.scoring[layer],
            ),
            self._log.agreed,
            self._log.lever,
        )
        self._layer = LayerLog(layer=layer, outcome=outcome, marks={"dispatch": begun})
        self._log.layers.append(self._layer)
        self._mark("balanced")
        if not outcome.changed:
            return topk_output
        return topk_output._replace(
            topk_ids=outcome.ids_TC.to(topk_output.topk_ids.dtype), topk_weights=outcome.weights_TC
        )

    def before_experts(self) -> None:
        """Rows have arrived."""
        self._mark("experts")

    def after_experts(self) -> None:
        """The grouped GEMM is enqueued."""
        self._mark("combine")

    def after_combine(self) -> None:
        """The layer is enqueued as a whole."""
        self._mark("combined")
        self._layer = None

    def end_pass(self) -> None:
        """Close the pass and hand it to the controller."""
        log, self._log, self._flags_T = self._log, None, None
        if log is None:
            return
        if log.agreed.phase == "prefill" and not self._seams_verified:
            verify_passed()
            self._seams_verified = True
        if self._controller and log.layers:
            copy = records.close(log, self._seat.device)
            self._controller.submit(
                Pending(build=lambda: self._record(copy))
            )

    def _record(self, copy: records.HostCopy) -> StepRecord:
        """Build a record in the controller thread, and learn the mass of a token from a cut."""
        seat = self._seat
        record = records.build(copy, seat.topology, seat.rank, self._mass_per_token)
        num_rows = int(record.num_tokens_R[seat.rank]) * seat.topology.num_layers
        if record.used_lever is not Lever.NONE and num_rows:
            self._mass_per_token = record.routed_mass / num_rows
        return record

    def status(self) -> dict[str, Any]:
        """The state of this rank as plain JSON types; full on the leader only."""
        policy = {**asdict(self._policy), "lever": self._policy.lever.name.lower()}
        answer: dict[str, Any] = {
            "active": True,
            "form": self._seat.form,
            "rank": self._seat.rank,
            "process_id": os.getpid(),
            "mode": self._config.mode,
            "config": msgspec.to_builtins(self._config),
            "topology": asdict(self._seat.topology),
            "policy": {k: v.name.lower() if hasattr(v, "name") else v for k, v in policy.items()},
            "num_passes": self._step,
            "seams": dict(points.num_passed),
            "controller": {"state": "off"},
        }
        if self._controller and self._ledger:
            answer["controller"] = self._controller_status()
            answer["totals"] = self._ledger.totals()
            answer["recent"] = self._ledger.recent()
        return answer

    def take_update(self, update: dict[str, int | float]) -> dict[str, int | float]:
        """Apply the knobs in a state update, all or none; returns what is not ours.

        The numbers come from `config.to_numbers` in the HTTP process, which has validated them, or
        from SGLang's own route for state updates, which has not: wrong ones are handed back, and
        SGLang refuses the update.
        """
        ours = {k[len(KNOB_PREFIX) :]: v for k, v in update.items() if k.startswith(KNOB_PREFIX)}
        if ours:
            try:
                numbers = configuration.to_numbers(self._config) | ours
                self._config = configuration.from_numbers(numbers)
            except ConfigError as error:
                logger.warning("sglang_moelb: a state update was refused: %s", error)
                return update
            if self._controller:
                self._controller.reconfigure(self._config)
        return {k: v for k, v in update.items() if not k.startswith(KNOB_PREFIX)}

    def _controller_status(self) -> dict[str, Any]:
        assert self._controller is not None
        answer: dict[str, Any] = {
            "state": self._controller.state,
            "num_passes": self._controller.num_submitted,
        }
        effects = self._controller.effects
        if effects:
            answer["last_decision"] = {
                "lever": effects.decision.lever.name.lower(),
                "reason": effects.decision.reason,
                "expected_gain": effects.decision.expected_gain,
                "expected_lost_mass_share": effects.decision.expected_lost_mass_share,
            }
        return answer

    def _mark(self, part: str) -> None:
        if self._layer is not None and self._controller is not None:
            self._layer.marks[part] = mark_on(self._seat.device)


def gate_reason(agreed: Agreed) -> str:
    """Why the agreed lever stays unused in this pass, from agreed numbers only; "" if it acts."""
    policy = agreed.policy
    if policy.lever is Lever.NONE:
        return ""
    if agreed.phase != "prefill":
        return f"{agreed.phase} pass: nothing is ever dropped outside prefill"
    num_tokens = sum(s.num_prefill_tokens for s in agreed.sizes_R)
    if num_tokens < policy.min_batch_tokens:
        return f"{num_tokens} prefill tokens, below min_batch_tokens {policy.min_batch_tokens}"
    return ""


def verify_passed() -> None:
    """End the process unless every seam of a prefill has been passed through by now."""
    missed = [
        f"  {s.name}: {s.target}" for s in SEAMS if s.moment == "prefill"
        and points.num_passed[s.name] == 0
    ]  # fmt: skip
    if missed:
        raise SystemExit(
            "sglang_moelb: after the first prefill these seams had not been passed through, so "
            "the balancer would silently not balance:\n" + "\n".join(missed)
        )


def _is_normal(dispatcher: Any) -> bool:
    return bool(dispatcher._get_impl().dispatch_mode.name == "NORMAL")
