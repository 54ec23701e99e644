"""The levers over a probe's routers: EP ranks as threads of a process, each with its balancer.

What runs here is `LayerBalancer`, the code that serves; the exchange between ranks is a barrier
instead of a collective. Host or device.

Shape letters: T tokens of all ranks, t tokens of one, K top-k, C columns, E experts, H hidden,
R ranks, L layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.probe.model import Probe, SparseBlock
from benchmarks.probe.moe import Products, run_experts
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.balance import LayerBalancer, LayerInput, LayerOutcome
from sglang_moelb.kernels.row_layout import FLAG_VISION, MASS_ONE
from sglang_moelb.types import Policy, Topology

TIMEOUT_S = 60.0


class Meeting:
    """An exchange between threads: everyone brings a row and leaves with all of them."""

    def __init__(self, num_ranks: int) -> None:
        self._rows: list[Tensor] = [torch.empty(0)] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=TIMEOUT_S)

    def gather(self, rank: int, row_W: Tensor) -> Tensor:
        """All rows in rank order, `[R, W]`."""
        self._rows[rank] = row_W
        self._barrier.wait()
        rows_RW = torch.stack(self._rows)
        self._barrier.wait()
        return rows_RW


@dataclass(frozen=True, slots=True)
class Door:
    """One rank's way into a meeting, in the shape of `ep.exchange.Exchange`."""

    meeting: Meeting
    rank: int

    def gather(self, row_W: Tensor) -> Tensor:
        """See `Meeting.gather`."""
        return self.meeting.gather(self.rank, row_W)


@dataclass(slots=True)
class Sums:
    """What a lever did, added up on the device over layers and passes."""

    lost: list[Tensor] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    load: list[Tensor] = field(default_factory=list)

    def add(self, outcomes: list[LayerOutcome], before_TK: Tensor, topology: Topology) -> None:
        """One layer of one pass; a load is rows of the busiest rank after over the mean before."""
        stats_8 = torch.stack([o.stats_8 for o in outcomes]).sum(0)
        self.routed.append(stats_8[0] / MASS_ONE)
        self.lost.append(stats_8[1] / MASS_ONE)
        after = torch.cat([o.ids_TC.reshape(-1) for o in outcomes])
        num_rows = (before_TK >= 0).sum()
        self.load.append(_rank_rows(after, topology).max() * topology.num_ranks / num_rows)

    def read(self) -> dict[str, float]:
        """Lost share of the gate mass; mean and 95th percentile of the load that is left."""
        load = torch.stack(self.load)
        return {
            "lost_mass_share": float(torch.stack(self.lost).sum() / torch.stack(self.routed).sum()),
            "load_mean": float(load.mean()),
            "load_p95": float(load.quantile(0.95)),
        }


class Ranks:
    """All ranks of one policy: `lift` puts them over a probe's routers."""

    def __init__(self, probe: Probe, policy: Policy, num_ranks: int) -> None:
        sizes = probe.sizes
        self._probe, self._policy = probe, policy
        self.topology = Topology(
            num_layers=sizes.num_layers,
            num_experts=sizes.num_experts,
            num_ranks=num_ranks,
            topk=sizes.topk,
        )
        meeting = Meeting(num_ranks)
        self._balancers = [
            LayerBalancer(self.topology, rank, Door(meeting, rank))  # type: ignore[arg-type]
            for rank in range(num_ranks)
        ]
        self.sums = Sums()
        self._decoding_T = torch.empty(0, dtype=torch.bool)
        self._num_prompt_tokens_R: list[int] = []

    def take(self, decoding_T: Tensor) -> None:
        """Say which tokens of the next batch are answers; waits for the device.

        In serving these come one by one in decode passes, which no lever touches: they neither
        count nor lose anything.
        """
        self._decoding_T = decoding_T
        shares = (~decoding_T).tensor_split(self.topology.num_ranks)
        self._num_prompt_tokens_R = torch.stack([share.sum() for share in shares]).tolist()

    @contextmanager
    def lift(self) -> Iterator[None]:
        """Within, each router of the probe goes through the balancers; `take` comes first."""
        blocks = [layer.mlp for layer in self._probe.model.language_model.layers]
        with ThreadPoolExecutor(self.topology.num_ranks) as pool:
            for layer, block in enumerate(blocks):
                block.forward = MethodType(self._forward(layer, pool), block)
            try:
                yield
            finally:
                for block in blocks:
                    del block.forward

    def _forward(self, layer: int, pool: ThreadPoolExecutor):  # type: ignore[no-untyped-def]
        def forward(
            block: SparseBlock, x_TH: Tensor, visual_T: Tensor, products: Products
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE = functional.linear(x_TH, block.gate.weight)
            share_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(block.topk, dim=-1)
            share_TK = share_TK / share_TK.sum(-1, keepdim=True)
            prompt_TK = ids_TK.where(~self._decoding_T[:, None], -1)
            outcomes = self._cut(layer, prompt_TK, share_TK, logits_TE, x_TH, visual_T, pool)
            self.sums.add(outcomes, prompt_TK, self.topology)
            ids_TC = torch.cat([o.ids_TC for o in outcomes]).long()
            weights_TC = torch.cat([o.weights_TC for o in outcomes])
            ids_TC[self._decoding_T, : block.topk] = ids_TK[self._decoding_T]
            weights_TC[self._decoding_T, : block.topk] = share_TK[self._decoding_T]
            weights_TC = weights_TC.where(ids_TC >= 0, 0.0).to(x_TH.dtype)
            experts = (block.experts.gate_up_proj, block.experts.down_proj)
            out_TH = run_experts(
                x_TH, ids_TC.clamp(min=0), weights_TC, *experts, products=products
            )
            nothing = logits_TE.new_zeros(())
            return out_TH, nothing, nothing

        return forward

    def _cut(
        self,
        layer: int,
        ids_TK: Tensor,
        share_TK: Tensor,
        logits_TE: Tensor,
        x_TH: Tensor,
        visual_T: Tensor,
        pool: ThreadPoolExecutor,
    ) -> list[LayerOutcome]:
        num_ranks = self.topology.num_ranks
        flags_T = visual_T.to(torch.uint8) * FLAG_VISION
        parts = zip(
            *(x.tensor_split(num_ranks) for x in (ids_TK, share_TK, logits_TE, x_TH, flags_T)),
            strict=True,
        )
        inputs = [
            LayerInput(
                layer=layer, ids_TK=ids, weights_TK=share, logits_TE=logits, hidden_TD=hidden,
                flags_T=flags, scoring="softmax",
            )
            for ids, share, logits, hidden, flags in parts
        ]  # fmt: skip
        agreed = Agreed(
            policy=self._policy, sizes_R=tuple(map(_sizes, self._num_prompt_tokens_R))
        )
        runs = [
            pool.submit(balancer.run, one, agreed, self._policy.lever)
            for balancer, one in zip(self._balancers, inputs, strict=True)
        ]
        return [run.result() for run in runs]


def _sizes(num_tokens: int) -> Sizes:
    return Sizes(num_tokens=num_tokens, num_prefill_tokens=num_tokens, phase="prefill")


def _rank_rows(ids: Tensor, topology: Topology) -> Tensor:
    """Rows on each rank, `[R]`."""
    rank_of = torch.where(ids >= 0, ids // topology.experts_per_rank, topology.num_ranks)
    return torch.bincount(rank_of.long(), minlength=topology.num_ranks + 1)[: topology.num_ranks]
