"""The lever replicate in a layer: pull experts under the dispatch, then run own ones and copies.

Driven by SGLang's serving thread. Slots are written on the side lane, behind the plan that fills
them and the last run that read them; the main lane waits for the writing before it reads. The plan
of a layer comes behind the experts of the one before on the main lane, so one set of slots serves
all layers. What is read of peers never changes while they serve, so no rank waits for another.

Shape letters: T rows of this rank, K top-k, L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang_moelb.ep.low.lanes import Event, Lanes
from sglang_moelb.ep.replicas.memory import LayerExperts
from sglang_moelb.ep.replicas.plan import CopyPlan
from sglang_moelb.kernels.pull_experts import pull_experts
from sglang_moelb.kernels.reroute import reroute
from sglang_moelb.types import Topology

# Of the SMs of a device while DeepEP's dispatch has its own: enough to fill NVLink.
NUM_PROGRAMS = 16
DISPATCH_DTYPE = torch.int64  # which SGLang makes of all ids for DeepEP, in a launch of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A layer whose rows and copies are on their way, and SGLang's dispatcher, which sends them.

    The plan is kept until the copies are there: the side lane reads it.
    """

    layer: int
    plan: CopyPlan
    normal: Any
    pulled: Event


class ReplicateLever:
    """Applies plans to the MoE layers `layers` of this rank, in the order of a forward pass."""

    def __init__(
        self,
        layers: Sequence[Any],
        experts_L: Sequence[LayerExperts],
        *,
        topology: Topology,
        rank: int,
        lanes: Lanes,
    ) -> None:
        self._layers = layers
        # A layer as SGLang's method sees it when it runs the copies with the own experts.
        self._wide_L = [SimpleNamespace(w13_weight=e.w13, w2_weight=e.w2) for e in experts_L]
        self._own_L = [(e.w13_R, e.w2_R) for e in experts_L]
        self._slots_L = [(e.w13[e.num_own :], e.w2[e.num_own :]) for e in experts_L]
        self._rank = rank
        self._lanes = lanes
        first = experts_L[0]
        self.num_slots = len(first.w13) - first.num_own
        self._num_experts = topology.num_experts
        self._num_physical = topology.num_ranks * len(first.w13)
        self._asked: Asked | None = None
        self._read: Event = None
        self._num_layers = 0

    def told(self) -> dict[str, int]:
        """For the status: what this rank has done."""
        return {"num_slots": self.num_slots, "num_replicated_layers": self._num_layers}

    def prepare(
        self, layer: int, dispatcher: Any, plan: CopyPlan, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Before the dispatch of `layer`: start its copies; the physical ids to dispatch by.

        Until the rows have arrived, `dispatcher`, of DeepEP's normal mode, sends to as many experts
        as there are with the slots. No host sync.
        """
        pulled = self._pull(layer, plan)
        ids_TK = reroute(
            ids_TK,
            plan.counts_RW,
            plan.slots_RS,
            plan.quota_ER,
            my_rank=self._rank,
            dtype=DISPATCH_DTYPE,
        )
        normal = dispatcher._get_impl()
        # DeepEP's one buffer must be made for the model's own number of experts: in low latency,
        # which it serves too, that decides what lies where.
        normal._get_buffer()
        normal.num_experts = self._num_physical
        self._asked = Asked(layer=layer, plan=plan, normal=normal, pulled=pulled)
        return ids_TK

    def run(self, module: Any, dispatch_output: Any) -> Any:
        """Run the experts of the layer that was prepared; None where SGLang is to run them.

        Through SGLang's own method and runner, in one call over own experts and slots.
        """
        asked = self._asked
        if asked is None or module is not self._layers[asked.layer]:
            return None
        self.forget()
        self._lanes.wait(asked.pulled)
        self._num_layers += 1
        combine_input = module.quant_method.apply(
            layer=self._wide_L[asked.layer], dispatch_output=dispatch_output
        )
        self._read = self._lanes.mark()
        return combine_input

    def forget(self) -> None:
        """The rows have arrived, or the pass has ended: dispatch by the model's own experts."""
        if self._asked is not None:
            self._asked.normal.num_experts = self._num_experts
            self._asked = None

    def _pull(self, layer: int, plan: CopyPlan) -> Event:
        """Start the copies of `layer` on the side lane; the event of their end."""
        planned = self._lanes.mark()
        after = (planned,) if self._read is None else (planned, self._read)
        with self._lanes.aside(after):
            pull_experts(
                self._own_L[layer],
                plan.slots_RS,
                self._slots_L[layer],
                my_rank=self._rank,
                num_programs=NUM_PROGRAMS,
            )
            return self._lanes.mark_aside()
