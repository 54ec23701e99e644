"""Which experts are copied to which ranks for one layer of one pass, and who computes which rows.

The plan is exact: every row is computed once, by its logical expert. It is a pure function of the
exchanged counts in integers, so all ranks make the same one and no rank has to be told. This is the
reference of the device op `kernels/place_replicas`.

1. 32 limits of a rank's time are tried side by side, from the mean rows to those of the busiest
   rank; the distance to the mean grows by 4/3 and 3/2 in turn, so the best of them is that near.
2. For one limit, ranks above it export, the busiest first. A copy is of the expert that has most
   rows left on its rank and goes to the rank with most room below the limit. It takes the least of
   what the exporter must lose, what the expert has and what fits, but the minimum at least.
3. What an exporter could not lose is left on it. The limit whose slowest rank ends earliest wins,
   and among equals the one with fewer copies. The last limit copies nothing: never worse than that.

Step 2 is after UltraEP's oracle (arXiv 2606.04101) with four changes of ours: a limit that cannot
be met still counts for what it reaches; the expert with most rows left is chosen anew for each
copy, which saves slots; copies cost time on both sides; and a rank that must lose less than the
minimum loses the minimum.

Shape letters: E logical experts, R ranks, S slots of a rank, C limits tried, e experts of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_moelb.types import IntArray

NUM_LIMITS = 32
MAX_RANKS = 256
MAX_SLOTS = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyCosts:
    """What a copied expert costs, in rows: of time lost on either side, and those worth a GEMM.

    `send_rows` and `receive_rows` are the rows that a rank computes in the time by which a copy
    delays it: 0 for a copy that is hidden behind the dispatch.
    """

    send_rows: int = 0
    receive_rows: int = 0
    min_rows: int = 1

    def __post_init__(self) -> None:
        """ValueError for costs that mean nothing."""
        if self.send_rows < 0 or self.receive_rows < 0 or self.min_rows < 1:
            raise ValueError(f"{self}: costs are at least 0 rows, and min_rows at least 1")

    @property
    def least_rows(self) -> int:
        """Fewest rows of a copy: `min_rows`, and more than sending it costs."""
        return max(self.min_rows, self.send_rows + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """Copies and quotas of one layer.

    `slots_RS` is the logical expert in each slot, -1 where there is none. `quota_ER` are the rows
    of each expert that each rank computes; they sum to the expert's rows, and are 0 but on its home
    and on ranks with a copy. `before_rows` and `after_rows` are the time of the slowest rank
    without and with the plan, in rows; the second is a bound.
    """

    slots_RS: IntArray
    quota_ER: IntArray
    before_rows: int
    after_rows: int

    @property
    def num_copies(self) -> int:
        """Slots in use over all ranks."""
        return int((self.slots_RS >= 0).sum())

    @property
    def rows_R(self) -> IntArray:
        """Rows that each rank computes."""
        rows_R: IntArray = self.quota_ER.sum(axis=0)
        return rows_R


def place_replicas(
    rows_RE: IntArray, *, num_slots: int, costs: CopyCosts | None = None
) -> ReplicaPlan:
    """Plan the copies of one layer.

    Args:
        rows_RE: routed rows by source rank and logical expert; the experts lie on their home ranks
            in equal blocks.
        num_slots: S, copies that a rank can hold beside its own experts, at most 255.
        costs: what copies cost, by default nothing.

    Raises ValueError for experts that do not split evenly over the ranks and sizes out of range.
    Runs on the host.

    Example: two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1, with 50, 30, 10 and 10 rows,
    and one slot a rank. The mean is 50; rank 0 must lose 30 rows, of which expert 0, its largest,
    can give all: slots [[-1], [0]], quotas [[20, 30], [30, 0], [0, 10], [0, 10]].
    """
    num_ranks, num_experts = rows_RE.shape
    check_sizes(num_ranks, num_experts, num_slots)
    load_E = rows_RE.sum(axis=0, dtype=np.int64)
    search = _Search(load_E.reshape(num_ranks, -1), num_slots, costs or CopyCosts())
    while search.running_C.any():
        search.step()
    score_C = search.limit_C + search.missed_C
    best = NUM_LIMITS - 1 - int(np.argmin(score_C[::-1]))

    home_E = np.arange(num_experts) // (num_experts // num_ranks)
    slots_RS = np.full((num_ranks, num_slots), -1)
    quota_ER = np.zeros((num_experts, num_ranks), dtype=np.int64)
    quota_ER[np.arange(num_experts), home_E] = load_E
    for copy in search.copies_C[best]:
        slots_RS[copy.rank, copy.slot] = copy.expert
        quota_ER[copy.expert, copy.rank] = copy.rows
        quota_ER[copy.expert, home_E[copy.expert]] -= copy.rows
    return ReplicaPlan(
        slots_RS=slots_RS,
        quota_ER=quota_ER,
        before_rows=int(search.limit_C[-1]),
        after_rows=int(score_C[best]),
    )


def deal_rows(rows_RE: IntArray, quota_ER: IntArray) -> IntArray:
    """Which of its rows each source rank sends where, int64 [R source, E, R computing].

    Rows whose source computes their expert stay there, as many as its quota takes: they need no
    network. The rest of an expert's rows, source after source, fill the rest of its quotas, rank
    after rank. Every source can compute its own part; the sums over sources are the quotas, those
    over computing ranks the rows. Runs on the host. Source: ours.

    Example: an expert with rows [6, 2] and quotas [3, 5]: source 0 keeps 3 and sends 3 to rank 1,
    which keeps its own 2.
    """
    rows_RE = rows_RE.astype(np.int64)
    num_ranks = len(rows_RE)
    local_RE = np.minimum(rows_RE, quota_ER.T)
    end_RE = np.cumsum(rows_RE - local_RE, axis=0)
    start_RE = end_RE - (rows_RE - local_RE)
    room_ER = quota_ER - local_RE.T
    room_end_ER = np.cumsum(room_ER, axis=1)
    first_RER = np.maximum(start_RE[:, :, None], (room_end_ER - room_ER)[None])
    last_RER = np.minimum(end_RE[:, :, None], room_end_ER[None])
    share_RER: IntArray = np.maximum(last_RER - first_RER, 0)
    share_RER[np.arange(num_ranks), :, np.arange(num_ranks)] += local_RE
    return share_RER


def check_sizes(num_ranks: int, num_experts: int, num_slots: int) -> None:
    """ValueError unless the planner can work with these sizes."""
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"{num_ranks} ranks: replicas are planned for 1 to {MAX_RANKS}")
    if num_experts == 0 or num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be split evenly over {num_ranks} ranks")
    if not 0 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"{num_slots} slots a rank: give 0 to {MAX_SLOTS}")


def limits(busiest: int, mean: int) -> IntArray:
    """The limits tried, int64 [C], ascending: the mean, then shares of the way to the busiest.

    The shares are 1, 3/4, 1/2, 3/8, 1/4 ... from the last limit down.
    """
    below_C = NUM_LIMITS - 1 - np.arange(NUM_LIMITS)
    limit_C: IntArray = mean + ((busiest - mean) * (4 - below_C % 2) >> (2 + below_C // 2))
    limit_C[0] = mean
    return limit_C


@dataclass(frozen=True, slots=True)
class _Copy:
    expert: int
    rank: int
    slot: int
    rows: int


class _Search:
    """The exports under all limits at once; a step makes at most one copy under each.

    `source_C` is the exporter in the order of loads, `need_C` the rows that it must still lose and
    `rest_Ce` what each of its experts still has. `room_CR` and `free_CR` are what ranks can take.
    """

    def __init__(self, load_Re: IntArray, num_slots: int, costs: CopyCosts) -> None:
        self.load_Re, self.costs, self.num_slots = load_Re, costs, num_slots
        self.load_R: IntArray = load_Re.sum(axis=1)
        self.order_R = np.argsort(-self.load_R, kind="stable")
        self.limit_C = limits(
            int(self.load_R.max()), -(-int(self.load_R.sum()) // len(self.load_R))
        )
        self.missed_C = np.zeros(NUM_LIMITS, dtype=np.int64)  # rows above it that must stay
        self.source_C = np.zeros(NUM_LIMITS, dtype=np.int64)
        self.need_C = self._need()
        self.running_C = self.need_C > 0
        self.rest_Ce = load_Re[self.order_R[self.source_C]]
        self.room_CR = np.maximum(self.limit_C[:, None] - self.load_R, 0)
        self.free_CR = np.full_like(self.room_CR, num_slots)
        self.copies_C: list[list[_Copy]] = [[] for _ in range(NUM_LIMITS)]

    def step(self) -> None:
        """One copy, or a source given up, or the end, under each limit that still runs."""
        least, send = self.costs.least_rows, self.costs.send_rows
        at_C = np.arange(NUM_LIMITS)
        rank_C = self._roomiest()
        expert_C = self.rest_Ce.argmax(axis=1)
        room_C = self.room_CR[at_C, rank_C] - self.costs.receive_rows
        rest_C = self.rest_Ce[at_C, expert_C]
        full_C = self.running_C & ((self.free_CR[at_C, rank_C] == 0) | (room_C < least))
        poor_C = self.running_C & ~full_C & (rest_C < least)
        copy_C = self.running_C & ~full_C & ~poor_C
        rows_C = np.minimum(np.minimum(self.need_C + send, rest_C), room_C)
        rows_C = np.where(copy_C, np.maximum(rows_C, least), 0)
        self._record(copy_C, rank_C, expert_C, rows_C)

        self.room_CR[at_C, rank_C] -= rows_C + np.where(copy_C, self.costs.receive_rows, 0)
        self.free_CR[at_C, rank_C] -= copy_C
        self.rest_Ce[at_C, expert_C] -= rows_C
        self.need_C = self.need_C - np.where(copy_C, rows_C - send, 0)
        done_C = self.running_C & (full_C | poor_C | (self.need_C <= 0))
        self.missed_C = np.where(done_C, np.maximum(self.missed_C, self.need_C), self.missed_C)
        self._next_source(done_C)
        # Of the sources that a full machine leaves, the next one misses most.
        self.missed_C = np.where(full_C, np.maximum(self.missed_C, self.need_C), self.missed_C)
        self.running_C = self.running_C & ~full_C & (self.need_C > 0)

    def _roomiest(self) -> IntArray:
        """The rank with a free slot and most room; ties by free slots, then the lower rank."""
        order_CR = np.where(self.free_CR > 0, self.room_CR * (MAX_SLOTS + 1) + self.free_CR, 0)
        rank_C: IntArray = order_CR.argmax(axis=1)
        return rank_C

    def _next_source(self, done_C: IntArray) -> None:
        self.source_C = self.source_C + done_C
        self.need_C = np.where(done_C, self._need(), self.need_C)
        source_C = self.order_R[np.minimum(self.source_C, len(self.order_R) - 1)]
        self.rest_Ce = np.where(done_C[:, None], self.load_Re[source_C], self.rest_Ce)

    def _need(self) -> IntArray:
        """Rows of the source above the limit; none behind the last."""
        last = len(self.order_R) - 1
        load_C = self.load_R[self.order_R[np.minimum(self.source_C, last)]]
        need_C: IntArray = np.where(self.source_C > last, 0, load_C - self.limit_C)
        return need_C

    def _record(
        self, copy_C: IntArray, rank_C: IntArray, place_C: IntArray, rows_C: IntArray
    ) -> None:
        for c in np.flatnonzero(copy_C):
            expert = self.order_R[self.source_C[c]] * self.load_Re.shape[1] + place_C[c]
            rank = rank_C[c]
            slot = self.num_slots - self.free_CR[c, rank]
            self.copies_C[c].append(_Copy(int(expert), int(rank), int(slot), int(rows_C[c])))
