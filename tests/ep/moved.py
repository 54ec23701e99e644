"""A MoE layer on real ranks whose replicas move: the passes of a server, without one.

Shape letters: R ranks, N rows, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_moelb.controller.moves import Move, Moved
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.exchange import Agreement
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.formats import FORMATS
from sglang_moelb.ep.resident.move import Mover
from sglang_moelb.ep.resident.moving import MovingAgreement
from sglang_moelb.ep.resident.weights import store
from sglang_moelb.placement import LayerLayout, LayerPlacement, layout, num_slots_of
from sglang_moelb.types import Policy

from .test_resident import Chosen, Layer, Rows, topology

MOST_PASSES = 200


@dataclass
class World:
    """What a rank of a server holds, and the passes that it runs."""

    group: dist.ProcessGroup
    rank: int
    placement: LayerPlacement
    low_format: str = "fp8"
    layer: Layer = field(init=False)
    place: LayerLayout = field(init=False)
    copies: ResidentExperts = field(init=False)
    mover: Mover = field(init=False)

    def __post_init__(self) -> None:
        num_ranks = dist.get_world_size(self.group)
        sizes = topology(num_ranks)
        self.layer = Layer(self.rank, num_ranks)
        num_slots = num_slots_of((self.placement,), num_ranks)
        self.place = layout(self.placement, sizes, num_slots)
        self.stored = store(
            self.layer, self.place, rank=self.rank, group=self.group,
            low_format=FORMATS[self.low_format],
        )  # fmt: skip
        width = num_ranks - self.place.copies_EC.shape[1]
        wide = np.pad(self.place.copies_EC, ((0, 0), (0, width)), constant_values=-1)
        layouts = [replace(self.place, copies_EC=wide)]
        self.copies = ResidentExperts([self.layer], [self.stored], layouts, rank=self.rank)
        self.mover = Mover(
            [self.layer], [self.stored], layouts, [self.placement], self.copies, sizes, self.rank,
            self.group,
        )  # fmt: skip
        self.agreement = MovingAgreement(Agreement(self.group), self.mover, self.copies)

    def run_pass(
        self,
        move: Move | None,
        *,
        move_ms: float = 1.0,
        num_tokens: int = 1,
        split: tuple[int, ...] = (),
    ) -> Agreed:
        """Open a pass in which the leader's policy wants `move` and the shares `split`."""
        word = move.word() if move and self.rank == 0 else 0
        sizes = Sizes(
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens,
            phase="prefill" if num_tokens else "idle",
        )
        split = split if self.rank == 0 else ()
        self.agreement.start(Policy(epoch=1, move=word, move_ms=move_ms, split=split), sizes)
        return self.agreement.finish()

    def run_moves(
        self,
        moves: Sequence[Move],
        *,
        num_tokens: int = 1,
        move_ms: float = 1.0,
        after_pass: Callable[[], None] = lambda: None,
    ) -> Moved:
        """Passes until all moves have ended; what is told then."""
        for move in moves:
            for _ in range(MOST_PASSES):
                self.run_pass(move, num_tokens=num_tokens, move_ms=move_ms)
                after_pass()
                if self.mover.moved.word == move.word():
                    break
            else:
                raise AssertionError(f"{move} did not end: {self.mover.told()}")
        return self.mover.moved

    def outputs(self, routed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """This rank's share of the layer's output for all tokens of all ranks, as the maps are."""
        x_RTH, ids_RTK, weights_RTK = routed
        before = self.copies._rank
        physical = []
        for source in range(len(ids_RTK)):
            self.copies._rank = source  # the maps are alike on all ranks, but for the turn
            physical.append(self.copies.physical(0, Chosen(ids_RTK[source])).topk_ids)
        self.copies._rank = before
        local_NK = torch.cat(physical) - self.rank * self.place.num_places
        inside = (local_NK >= 0) & (local_NK < self.place.num_places)
        local_NK = local_NK.where(inside, -1)
        counts = local_NK[inside].bincount(minlength=self.place.num_places).tolist()
        rows = Rows(x_RTH.flatten(0, 1), None, local_NK, weights_RTK.flatten(0, 1), counts)
        done: Tensor = self.copies.run(self.layer, rows).hidden_states
        return done

    def maps(self) -> tuple[list[Any], list[Any]]:
        """The copies of every expert, as rows are sent."""
        return self.copies._copies_L[0].tolist(), self.copies._num_copies_L[0].tolist()
