"""From a batch to the log of its pass: what the ranks agree on, and what follows for this pass.

Called by SGLang's serving thread through the runtime.

Shape letters: T rows of this rank's batch (padded).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.clock import HostMark, mark_on, stream_on
from sglang_moelb.ep.controller_link import ControllerLink
from sglang_moelb.ep.exchange import Agreement
from sglang_moelb.ep.expert_times import ExpertTimes
from sglang_moelb.ep.modality import EvenFlags, Requests, token_flags
from sglang_moelb.ep.records import AnyMark, PassLog
from sglang_moelb.ep.resident.moving import MovingAgreement
from sglang_moelb.ep.seat import Seat
from sglang_moelb.types import Lever, Policy

UNKNOWN_REQUESTS = Requests(runs=(), phase="prefill")
# Marks cost as much host time as launches, and a fit of costs needs no more passes than these.
TIMED_FIRST, TIMED_EVERY = 4, 5
REPORTED = (Lever.NONE, Lever.DOWNGRADE, Lever.REPLICATE)  # levers whose passes all ranks time


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """A pass that has begun and whose agreement is on its way."""

    requests: Requests
    input_ids_T: torch.Tensor
    has_images: bool
    flags_T: torch.Tensor | None
    begun: AnyMark
    stream: torch.cuda.Stream | None


class PassOpener:
    """Opens the passes of one rank: `begin` sends, `opened` waits when the pass is first needed."""

    def __init__(
        self,
        seat: Seat,
        agreement: Agreement | MovingAgreement,
        controller: ControllerLink | None,
        sample_every: int = 0,
    ) -> None:
        self._seat = seat
        self._agreement = agreement
        self._controller = controller
        self._even_flags = EvenFlags()
        self._opening: Opening | None = None
        self.log: PassLog | None = None  # of the pass under way, once it has been asked for
        self._sample_every = sample_every
        self._num_prefills = 0
        self._num_large = 0  # passes that the controller estimates from
        self.num_passes = 0
        self.policy = Policy(epoch=0)
        self.expert_times = ExpertTimes()  # of a rank that is not the leader

    def begin(self, forward_batch: Any) -> None:
        """Start to agree with the other ranks on what holds for this pass, and flag its tokens."""
        requests = getattr(forward_batch, "moelb_requests", UNKNOWN_REQUESTS)
        input_ids_T = forward_batch.input_ids
        start, stop = self._seat.window.bounds(input_ids_T.shape[0])
        num_tokens = max(min(requests.num_tokens, stop) - start, 0)
        prefills = requests.phase == "prefill"
        images = getattr(forward_batch, "mm_inputs", ())
        has_images = images == () or any(image is not None for image in images or ())
        mine = Sizes(
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens if prefills else 0,
            phase=requests.phase,
            timed_step=self.expert_times.step,
            experts_us=self.expert_times.experts_us,
        )
        device, stream = self._seat.device, None
        begun: AnyMark = HostMark()
        if self._controller:  # only the leader's times are read
            stream = stream_on(device)
            begun = mark_on(device, stream)
        wanted = self._controller.policy() if self._controller else self.policy
        self._agreement.start(wanted, mine)
        self._opening = Opening(
            requests=requests,
            input_ids_T=input_ids_T,
            has_images=has_images,
            # SGLang clamps the ids of images inside the forward; other batches have none.
            flags_T=self._flags(input_ids_T, requests, has_images) if prefills else None,
            begun=begun,
            stream=stream,
        )

    def opened(self) -> PassLog | None:
        """The pass under way, or None; waits for the agreement when first asked.

        None also for a pass in which no rank prefills: no lever can act in it, and decode would pay
        for the exchange with every token. All ranks have agreed on the phase, so all stay out of
        the exchange together.
        """
        opening = self._opening
        if opening is None:
            return self.log
        self._opening = None
        if self._controller:
            self._controller.pass_begun()
        else:
            self.expert_times.look()
        agreed = self._agreement.finish()
        self.policy = agreed.policy
        step = self.num_passes
        self.num_passes += 1
        if agreed.phase != "prefill":
            return None
        flags_T = opening.flags_T
        if flags_T is None:
            flags_T = self._flags(opening.input_ids_T, opening.requests, opening.has_images)
        reason = gate_reason(agreed)
        lever = Lever.NONE if reason else agreed.policy.lever
        self._num_large += agreed.num_tokens >= agreed.policy.min_batch_tokens
        timed = self._is_timed(lever)
        stream = opening.stream
        if timed and not self._controller:
            stream = stream_on(self._seat.device)
        self.log = PassLog(
            step=step,
            agreed=agreed,
            lever=lever,
            gate_reason=reason,
            begun=opening.begun,
            stream=stream,
            timed=timed,
            flags_T=flags_T,
            tokens_L=[] if self._is_sampled() else None,
        )
        return self.log

    def close(self) -> PassLog | None:
        """The pass that ends, or None as `opened`; no pass is under way afterwards."""
        log = self.opened()
        self.log = None
        return log

    def _flags(
        self, input_ids_T: torch.Tensor, requests: Requests, has_images: bool
    ) -> torch.Tensor:
        kinds = requests.kinds
        if has_images or len(kinds) > 1:
            return token_flags(input_ids_T, requests)
        return self._even_flags.of(input_ids_T, kinds.pop())

    def _is_sampled(self) -> bool:
        """Whether `ep.token_trace` takes this prefill pass; alike on all ranks."""
        self._num_prefills += 1
        return bool(self._sample_every) and (self._num_prefills - 1) % self._sample_every == 0

    def _is_timed(self, lever: Lever) -> bool:
        """Whether to time the pass here: all ranks the same passes, others fewer levers."""
        often = self._num_large <= TIMED_FIRST or self._num_large % TIMED_EVERY == 0
        is_read = self._controller is not None or lever in REPORTED
        return is_read and (often or lever is not Lever.NONE)


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
