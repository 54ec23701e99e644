"""The agreement of a pass where resident replicas may move: it carries their reports, and acts.

Shape letters: none.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.exchange import Agreement
from sglang_moelb.ep.resident.move import Mover
from sglang_moelb.types import Policy


class MovingAgreement:
    """An `Agreement` whose end does the pass's part of a move, before its layers are run."""

    def __init__(self, agreement: Agreement, mover: Mover) -> None:
        self._agreement = agreement
        self._mover = mover

    def start(self, policy: Policy, sizes: Sizes) -> None:
        """As `Agreement.start`, with what this rank reports of the move."""
        self._agreement.start(policy, self._mover.report(sizes))

    def finish(self) -> Agreed:
        """As `Agreement.finish`; every rank then does the same part of the move."""
        agreed = self._agreement.finish()
        self._mover.advance(agreed)
        return replace(agreed, moved=self._mover.moved)
