"""From a batch to the log of its pass: what the ranks agree on, and what follows for this pass.

Called by SGLang's serving thread through the runtime.

Shape letters: T rows of this rank's batch (padded).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_moelb.ep.clock import mark_on
from sglang_moelb.ep.controller_thread import ControllerThread
from sglang_moelb.ep.exchange import Agreed, Agreement, Sizes
from sglang_moelb.ep.modality import Requests, token_flags
from sglang_moelb.ep.records import AnyMark, PassLog
from sglang_moelb.ep.seat import Seat
from sglang_moelb.types import Lever, Policy

UNKNOWN_REQUESTS = Requests(runs=(), phase="prefill")
# Marks cost as much host time as launches, and a fit of costs needs no more passes than these.
TIMED_FIRST, TIMED_EVERY = 4, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """A pass that has begun and whose agreement is on its way."""

    requests: Requests
    input_ids_T: torch.Tensor
    flags_T: torch.Tensor | None
    begun: AnyMark


class PassOpener:
    """Opens the passes of one rank: `begin` sends, `opened` waits when the pass is first needed."""

    def __init__(
        self,
        seat: Seat,
        agreement: Agreement,
        controller: ControllerThread | None,
        sample_every: int = 0,
    ) -> None:
        self._seat = seat
        self._agreement = agreement
        self._controller = controller
        self._opening: Opening | None = None
        self._log: PassLog | None = None
        self._sample_every = sample_every
        self._num_prefills = 0
        self._num_large = 0  # passes that the controller estimates from
        self.num_passes = 0
        self.policy = Policy(epoch=0)

    def begin(self, forward_batch: Any) -> None:
        """Start to agree with the other ranks on what holds for this pass, and flag its tokens."""
        requests = getattr(forward_batch, "moelb_requests", UNKNOWN_REQUESTS)
        input_ids_T = forward_batch.input_ids
        start, stop = self._seat.window.bounds(input_ids_T.shape[0])
        num_tokens = max(min(requests.num_tokens, stop) - start, 0)
        prefills = requests.phase == "prefill"
        mine = Sizes(
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens if prefills else 0,
            num_protected_tokens=requests.num_protected,
            phase=requests.phase,
        )
        begun = mark_on(self._seat.device)
        wanted = self._controller.policy() if self._controller else self.policy
        self._agreement.start(wanted, mine)
        self._opening = Opening(
            requests=requests,
            input_ids_T=input_ids_T,
            # SGLang clamps the ids of images inside the forward; other batches have none.
            flags_T=token_flags(input_ids_T, requests) if prefills else None,
            begun=begun,
        )
        if self._controller:
            self._controller.pass_begun()

    def opened(self) -> PassLog | None:
        """The pass under way, or None; waits for the agreement when first asked."""
        opening, self._opening = self._opening, None
        if opening is None:
            return self._log
        agreed = self._agreement.finish()
        self.policy = agreed.policy
        prefill = agreed.phase == "prefill"
        flags_T = opening.flags_T
        if prefill and flags_T is None:
            flags_T = token_flags(opening.input_ids_T, opening.requests)
        reason = gate_reason(agreed)
        lever = Lever.NONE if reason else agreed.policy.lever
        self._num_large += prefill and agreed.num_tokens >= agreed.policy.min_batch_tokens
        self._log = PassLog(
            step=self.num_passes,
            agreed=agreed,
            lever=lever,
            gate_reason=reason,
            begun=opening.begun,
            timed=self._is_timed(lever),
            flags_T=flags_T,
            tokens_L=[] if prefill and self._is_sampled() else None,
        )
        self.num_passes += 1
        return self._log

    def close(self) -> PassLog | None:
        """The pass that ends, or None; no pass is under way afterwards."""
        log = self.opened()
        self._log = None
        return log

    def _is_sampled(self) -> bool:
        """Whether `ep.token_trace` takes this prefill pass; alike on all ranks."""
        self._num_prefills += 1
        return bool(self._sample_every) and (self._num_prefills - 1) % self._sample_every == 0

    def _is_timed(self, lever: Lever) -> bool:
        often = self._num_large <= TIMED_FIRST or self._num_large % TIMED_EVERY == 0
        return self._controller is not None and (often or lever is not Lever.NONE)


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
