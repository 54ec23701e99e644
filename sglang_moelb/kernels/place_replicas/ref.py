"""Reference of `place_replicas` in plain torch. Letters as in the package, X ranks or experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout

NUM_LIMITS = 32
MAX_RANKS = 256
MAX_SLOTS = 255
MAX_LOCAL = 1024


def place_replicas(
    rows_RW: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    send_rows: int = 0,
    receive_rows: int = 0,
    min_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sglang_moelb.kernels.place_replicas`. Runs wherever its tensors are, with syncs."""
    check_place(rows_RW, num_experts, num_slots, (send_rows, receive_rows, min_rows))
    load_Re = routed_rows(rows_RW, num_experts).sum(dim=0).view(len(rows_RW), -1)
    search = _Search(load_Re, num_slots, send_rows, receive_rows, min_rows)
    copies = []
    while bool(search.running_C.any()):
        copies.append(search.step())
    score_C = search.limit_C + search.missed_C
    best = NUM_LIMITS - 1 - int(_first_max(-score_C.flip(0)[None]))
    times_2 = torch.stack([search.limit_C[-1], score_C[best]])
    slots_RS, quota_ER = _plan([copy[:, best].tolist() for copy in copies], load_Re, num_slots)
    return slots_RS, quota_ER, times_2


class _Search:
    """The exports under all limits; see `controller.place_replicas` for what the names mean."""

    def __init__(
        self, load_Re: Tensor, num_slots: int, send_rows: int, receive_rows: int, min_rows: int
    ) -> None:
        self.send, self.receive, self.num_slots = send_rows, receive_rows, num_slots
        self.least = max(min_rows, send_rows + 1)
        self.load_Re, self.load_R = load_Re, load_Re.sum(dim=1)
        self.order_R = self.load_R.argsort(descending=True, stable=True)
        self.limit_C = _limits(self.load_R)
        self.missed_C = torch.zeros_like(self.limit_C)
        self.source_C = torch.zeros_like(self.limit_C)
        self.need_C = self.load_R[self.order_R[0]] - self.limit_C
        self.running_C = self.need_C > 0
        self.rest_Ce = load_Re[self.order_R[self.source_C]]
        self.room_CR = (self.limit_C[:, None] - self.load_R).clamp(min=0)
        self.free_CR = torch.full_like(self.room_CR, num_slots)

    def step(self) -> Tensor:
        """One step under every limit; int64 [4, C]: expert, rank, slot, rows; 0 without a copy."""
        order_CR = torch.where(self.free_CR > 0, self.room_CR * 256 + self.free_CR, 0)
        rank_C1, place_C1 = _first_max(order_CR), _first_max(self.rest_Ce)
        free_C = self.free_CR.gather(1, rank_C1)[:, 0]
        room_C = self.room_CR.gather(1, rank_C1)[:, 0] - self.receive
        rest_C = self.rest_Ce.gather(1, place_C1)[:, 0]
        full_C = self.running_C & ((free_C == 0) | (room_C < self.least))
        copy_C = self.running_C & ~full_C & (rest_C >= self.least)
        rows_C = torch.minimum(torch.minimum(self.need_C + self.send, rest_C), room_C)
        rows_C = torch.where(copy_C, rows_C.clamp(min=self.least), 0)
        home_C = self.order_R[self.source_C.clamp(max=len(self.order_R) - 1)]
        expert_C = home_C * self.load_Re.shape[1] + place_C1[:, 0]

        taken_C = rows_C + self.receive * copy_C
        self.room_CR.scatter_add_(1, rank_C1, -taken_C[:, None])
        self.free_CR.scatter_add_(1, rank_C1, -copy_C.long()[:, None])
        self.rest_Ce.scatter_add_(1, place_C1, -rows_C[:, None])
        self.need_C = self.need_C - torch.where(copy_C, rows_C - self.send, 0)
        done_C = self.running_C & (~copy_C | (self.need_C <= 0))
        self._miss(done_C)
        self._next_source(done_C)
        self._miss(full_C)
        self.running_C = self.running_C & ~full_C & (self.need_C > 0)
        return torch.stack([expert_C, rank_C1[:, 0], self.num_slots - free_C, rows_C])

    def _miss(self, where_C: Tensor) -> None:
        missed_C = self.missed_C.maximum(self.need_C)
        self.missed_C = torch.where(where_C, missed_C, self.missed_C)

    def _next_source(self, done_C: Tensor) -> None:
        last = len(self.order_R) - 1
        self.source_C = self.source_C + done_C.long()
        rank_C = self.order_R[self.source_C.clamp(max=last)]
        need_C = torch.where(self.source_C > last, 0, self.load_R[rank_C] - self.limit_C)
        self.need_C = torch.where(done_C, need_C, self.need_C)
        self.rest_Ce = torch.where(done_C[:, None], self.load_Re[rank_C], self.rest_Ce)


def _limits(load_R: Tensor) -> Tensor:
    """From the mean to the busiest, in steps of 4/3 and 3/2 of the distance to the mean."""
    mean = -(-load_R.sum() // len(load_R))
    below_C = NUM_LIMITS - 1 - torch.arange(NUM_LIMITS, device=load_R.device)
    limit_C = mean + ((load_R.max() - mean) * (4 - below_C % 2) >> (2 + below_C // 2))
    limit_C[0] = mean
    return limit_C


def _first_max(values_CX: Tensor) -> Tensor:
    """Index [C, 1] of the largest along X, the first of equal ones; `argmax` promises no order."""
    is_max_CX = values_CX == values_CX.max(dim=1, keepdim=True).values
    place_X = torch.arange(values_CX.shape[1], device=values_CX.device)
    return torch.where(is_max_CX, place_X, len(place_X)).min(dim=1, keepdim=True).values


def _plan(copies: list[list[int]], load_Re: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    num_ranks, num_local = load_Re.shape
    device = load_Re.device
    slots_RS = torch.full((num_ranks, num_slots), -1, dtype=torch.int32, device=device)
    quota_ER = torch.zeros(load_Re.numel(), num_ranks, dtype=torch.int32, device=device)
    experts_E = torch.arange(load_Re.numel(), device=device)
    quota_ER[experts_E, experts_E // num_local] = load_Re.flatten().int()
    for expert, rank, slot, rows in copies:
        if rows:
            slots_RS[rank, slot] = expert
            quota_ER[expert, rank] = rows
            quota_ER[expert, expert // num_local] -= rows
    return slots_RS, quota_ER


def routed_rows(rows_RW: Tensor, num_experts: int) -> Tensor:
    """Routed rows by source rank and expert, int64 [R, E]. Host or device."""
    counts_RE5 = layout.counts_of(rows_RW, num_experts).long()
    return counts_RE5[..., layout.C_TEXT_ROWS] + counts_RE5[..., layout.C_VISION_ROWS]


def check_place(
    rows_RW: Tensor, num_experts: int, num_slots: int, costs: tuple[int, int, int]
) -> None:
    """Raise ValueError for sizes and costs that cannot be planned with. Host only, no sync."""
    num_ranks, width = rows_RW.shape
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ValueError(f"{num_ranks} ranks: replicas are planned for 1 to {MAX_RANKS}")
    if num_experts == 0 or num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be split evenly over {num_ranks} ranks")
    if num_experts // num_ranks > MAX_LOCAL:
        raise ValueError(f"{num_experts // num_ranks} experts a rank: at most {MAX_LOCAL}")
    if not 0 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"{num_slots} slots a rank: give 0 to {MAX_SLOTS}")
    if width < layout.row_width(num_experts, with_histogram=False):
        raise ValueError(f"rows of width {width} do not hold {num_experts} experts")
    if min(costs) < 0 or costs[2] < 1:
        raise ValueError(f"costs {costs}: at least 0 rows, and min_rows at least 1")
