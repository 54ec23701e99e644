"""The two collectives of the control path, both on the EP group and both on every rank.

`Agreement` runs once a pass on the host, always, and carries the leader's policy and each rank's
sizes, so every rank acts on one policy for the whole pass. `Exchange` runs on the device: once a
MoE layer where a lever acts, once at the end of the pass where none does. What decides which is
agreed, so no rank's own mode or configuration can make it wait for another.

Shape letters: R ranks, W row width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sglang_moelb.controller.encode import NUM_WORDS, decode, encode
from sglang_moelb.ep.agreed import PHASES, Agreed, Sizes
from sglang_moelb.ep.host_gather import host_gather
from sglang_moelb.kernels.row_layout import row_width
from sglang_moelb.types import Policy

LEADER = 0
NUM_SIZES = 7


class Agreement:
    """Host all-gather of the leader's policy and every rank's sizes, once a pass.

    `start` and `finish` take turns; between them the ranks' messages travel while the host works.
    """

    def __init__(self, group: dist.ProcessGroup, *, one_host: bool = False) -> None:
        """`group` is of gloo; `one_host` says that its ranks share one."""
        self._rank = dist.get_rank(group)
        self._gather = host_gather(group, NUM_WORDS + NUM_SIZES, one_host=one_host)
        self._reason = ""
        self._encoded: tuple[Policy | None, tuple[int, ...]] = (None, (0,) * NUM_WORDS)
        self._last_words: list[int] = []
        self._last_policy = Policy(epoch=0)

    def start(self, policy: Policy, sizes: Sizes) -> None:
        """Send `sizes` and, on the leader, `policy`; does not wait."""
        self._reason = policy.reason
        if self._rank == LEADER and policy is not self._encoded[0]:
            self._encoded = policy, encode(policy)
        self._gather.start(
            (
                *self._encoded[1],
                sizes.num_tokens,
                sizes.num_prefill_tokens,
                PHASES.index(sizes.phase),
                sizes.move_us,
                sizes.move_sum,
                sizes.timed_step,
                sizes.experts_us,
            )
        )

    def finish(self) -> Agreed:
        """Wait for all ranks and adopt the leader's policy."""
        rows = self._gather.finish()
        agreed_words = rows[LEADER][:NUM_WORDS]
        # The leader decodes its own words too: it must not act on digits that did not travel.
        reason = self._reason if self._rank == LEADER else "agreed with the leader"
        if (agreed_words, reason) != (self._last_words, self._last_policy.reason):
            self._last_policy = decode(agreed_words, reason=reason)
        self._last_words = agreed_words
        sizes_R = tuple(
            Sizes(
                num_tokens=n,
                num_prefill_tokens=p,
                phase=PHASES[f],
                move_us=us,
                move_sum=checksum,
                timed_step=step,
                experts_us=experts_us,
            )
            for n, p, f, us, checksum, step, experts_us in (row[NUM_WORDS:] for row in rows)
        )
        return Agreed(policy=self._last_policy, sizes_R=sizes_R)


class Exchange:
    """Device all-gather of every rank's counts by the group's backend."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)

    def place(self, width: int) -> torch.Tensor | None:
        """Memory that the next gather would take a row of `width` from without a copy, or None."""
        return None

    def gather(self, row_W: torch.Tensor) -> torch.Tensor:
        """All rows in rank order, `[R, W]` int32, on the device of `row_W`."""
        return gather_rows(row_W, self._num_ranks, self._group)

    def offer(self, row_W: torch.Tensor) -> None:
        """Take part in a gather whose rows this rank does not want."""
        self.gather(row_W)


class SymmetricExchange:
    """The same over symmetric memory of one host: one copy, one barrier, one read of all peers.

    Two slots in turn: a rank writes a slot again only after the barrier of the next exchange, which
    its peers pass after they have read the slot.
    """

    NUM_SLOTS = 2

    def __init__(self, group: dist.ProcessGroup, max_width: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._max_width = max_width
        self._buffer = symmetric.empty(
            self.NUM_SLOTS * max_width, dtype=torch.int32, device=device
        )
        self._buffer.zero_()
        self._handle = symmetric.rendezvous(self._buffer, group.group_name)
        self._num_ranks = dist.get_world_size(group)
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._places: dict[tuple[int, int], torch.Tensor] = {}
        self._turn = 0

    def place(self, width: int) -> torch.Tensor:
        """Memory that the next gather takes a row of `width` from without a copy.

        AssertionError for a row wider than the buffer.
        """
        assert width <= self._max_width, (width, self._max_width)
        return self._own(self._start(), width)

    def gather(self, row_W: torch.Tensor) -> torch.Tensor:
        """All rows in rank order, `[R, W]` int32; every rank must bring the same W.

        AssertionError for a row wider than the buffer.
        """
        start, width = self._start(), row_W.numel()
        self.offer(row_W)
        return torch.cat(self._peers(start, width)).view(self._num_ranks, width)

    def offer(self, row_W: torch.Tensor) -> None:
        """Take part in a gather whose rows this rank does not want; for the rest as `gather`."""
        place_W = self.place(row_W.numel())
        if place_W.data_ptr() != row_W.data_ptr():
            place_W.copy_(row_W)
        self._turn += 1
        self._handle.barrier(channel=0)

    def _start(self) -> int:
        return (self._turn % self.NUM_SLOTS) * self._max_width

    def _own(self, start: int, width: int) -> torch.Tensor:
        key = (start, width)
        if key not in self._places:
            self._places[key] = self._buffer[start : start + width]
        return self._places[key]

    def _peers(self, start: int, width: int) -> list[torch.Tensor]:
        key = (start, width)
        if key not in self._views:
            self._views[key] = [
                self._handle.get_buffer(rank, (width,), torch.int32, start)
                for rank in range(self._num_ranks)
            ]
        return self._views[key]


def exchange_for(
    group: dist.ProcessGroup,
    *,
    num_layers: int,
    num_experts: int,
    device: torch.device,
    one_host: bool,
) -> Exchange | SymmetricExchange:
    """Symmetric memory between CUDA ranks of one host, else the group's own all-gather."""
    if device.type == "cuda" and one_host:
        width = max(
            row_width(num_experts, with_histogram=True),
            num_layers * row_width(num_experts, with_histogram=False),
        )
        return SymmetricExchange(group, width, device)
    return Exchange(group)


def gather_rows(row_W: torch.Tensor, num_ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's `row_W`, `[R, W]` in rank order. Gloo takes a flat output only."""
    flat = row_W.new_empty(num_ranks * row_W.numel())
    dist.all_gather_into_tensor(flat, row_W, group=group)
    return flat.view(num_ranks, row_W.numel())
