"""The agreement of a pass where resident replicas may move: it carries their reports, and acts.

Shape letters: none.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_moelb.controller.split import split_of
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.exchange import Agreement
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.move import Mover
from sglang_moelb.types import Policy


class MovingAgreement:
    """An `Agreement` whose end takes new shares of copies and does the pass's part of a move.

    Before the pass's layers are run.
    """

    def __init__(self, agreement: Agreement, mover: Mover, copies: ResidentExperts) -> None:
        self._agreement = agreement
        self._mover = mover
        self._copies = copies
        self._split: tuple[int, ...] = ()

    def start(self, policy: Policy, sizes: Sizes) -> None:
        """As `Agreement.start`, with what this rank reports of the move."""
        self._agreement.start(policy, self._mover.report(sizes))

    def finish(self) -> Agreed:
        """As `Agreement.finish`; every rank then does the same part of the move."""
        agreed = self._agreement.finish()
        # Before the move: shares are of the copies that there were when they were made.
        if agreed.policy.split != self._split:
            self._split = agreed.policy.split
            for split in map(split_of, self._split):
                assert split is not None
                self._copies.share(split)
        self._mover.advance(agreed)
        return replace(agreed, moved=replace(self._mover.moved, split=self._split))
