"""The nouns of a replay.

Shape letters: P passes, L MoE layers, S source ranks of the trace, R EP ranks of the replay,
E logical experts, M modalities (text, vision).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sglang_moelb.types import FloatArray, IntArray


class ReplayError(ValueError):
    """A replay was asked for that cannot be done; the message names the option and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Prefill passes as rules see them.

    `rows_PLSEM` are routed rows by the rank they came from, `rows_PLEM` their sum over sources;
    the S sources are those of the trace, also where R, the number of EP ranks, is another.
    """

    rows_PLSEM: IntArray
    rows_PLEM: IntArray
    num_tokens_PS: IntArray
    num_protected_P: IntArray
    num_refused_P: IntArray
    num_ranks: int
    topk: int

    def __len__(self) -> int:
        """The number of passes."""
        return len(self.rows_PLEM)

    @property
    def busiest_tokens_P(self) -> IntArray:
        """Tokens of the rank with most of them; dealt evenly where ranks are not the trace's."""
        most_P: IntArray = self.num_tokens_PS.max(axis=1)
        if self.num_tokens_PS.shape[1] != self.num_ranks:
            most_P = -(-self.num_tokens_PS.sum(axis=1) // self.num_ranks)
        return most_P

    def only(self, at: int) -> Counts:
        """Pass number `at` alone."""
        one = slice(at, at + 1)
        return replace(
            self,
            rows_PLSEM=self.rows_PLSEM[one],
            rows_PLEM=self.rows_PLEM[one],
            num_tokens_PS=self.num_tokens_PS[one],
            num_protected_P=self.num_protected_P[one],
            num_refused_P=self.num_refused_P[one],
        )

    @property
    def rows_PLE(self) -> IntArray:
        """Routed rows on each expert."""
        both_PLE: IntArray = self.rows_PLEM[..., 0] + self.rows_PLEM[..., 1]
        return both_PLE

    @property
    def rows_PLR(self) -> IntArray:
        """Routed rows on each rank, experts in blocks as they are loaded."""
        return by_rank(self.rows_PLE, self.num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a rule leaves of some passes.

    `rows_PLR` are the rows that the experts of each rank compute, `lost_PL` the routed rows of a
    layer that nobody computes (None: exact), `low_PLR` 1 where a rank runs at low precision, and
    `levers_P` which of our levers acted in each pass (None: the rule is not ours).
    """

    rows_PLR: IntArray
    lost_PL: IntArray | None = None
    low_PLR: IntArray | None = None
    levers_P: IntArray | None = None


Rule = Callable[[Counts], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """An arm's passes, scored; balance is max/mean of the ranks' rows (at low precision: of what
    they take), `peak` the busiest rank's over the mean before any rule; the lost share is of rows.
    """

    name: str
    exact: bool
    balance_PL: FloatArray
    peak_PL: FloatArray
    lost_share_P: FloatArray
    low_share_P: FloatArray
    step_ms_P: FloatArray


def by_rank(rows_PLE: IntArray, num_ranks: int) -> IntArray:
    """Sums over blocks of the last axis, one block a rank."""
    rows_PLR: IntArray = rows_PLE.reshape(*rows_PLE.shape[:-1], num_ranks, -1).sum(axis=-1)
    return rows_PLR
