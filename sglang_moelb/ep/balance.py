"""One MoE layer in a pass with a lever: observe, exchange, plan, apply. No host sync.

The same code on CPU and CUDA; the kernels choose their implementation by device.

Shape letters: T rows of this rank, K top-k, C columns (K and expansion candidates), E logical
experts, R ranks, G groups, W row width, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_moelb.ep.agreed import Agreed
from sglang_moelb.ep.capacity import group_capacity, num_groups_of
from sglang_moelb.ep.cut import Asked, cut_to
from sglang_moelb.ep.exchange import Exchange, SymmetricExchange
from sglang_moelb.ep.macs import MacsState, reroute
from sglang_moelb.kernels.count_experts import KeyRule, count_experts
from sglang_moelb.kernels.row_layout import (
    FLAG_PROTECTED,
    NUM_COUNTS,
    NUM_HEADER,
)
from sglang_moelb.kernels.token_amounts import token_amounts
from sglang_moelb.kernels.widen_candidates import widen_candidates
from sglang_moelb.types import Expansion, Lever, Policy, Rule, Scope, Topology

MAX_COLUMNS = 32  # what DeepEP's dispatch takes as top-k


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInput:
    """What the router of one layer says about this rank's rows."""

    layer: int
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor
    hidden_TD: torch.Tensor
    flags_T: torch.Tensor
    scoring: str  # "softmax" or "sigmoid"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOutcome:
    """Routing after the layer's plan, and what the record needs (device tensors)."""

    ids_TC: torch.Tensor
    weights_TC: torch.Tensor
    counts_RW: torch.Tensor
    stats_8: torch.Tensor


class LayerBalancer:
    """Runs the pipeline of a layer for the policy of the current pass."""

    def __init__(
        self, topology: Topology, rank: int, exchange: Exchange | SymmetricExchange
    ) -> None:
        self._topology = topology
        self._rank = rank
        self._exchange = exchange
        self.macs = MacsState(topology)

    def run(self, routed: LayerInput, agreed: Agreed, lever: Lever) -> LayerOutcome:
        """The layer's routing under `lever`, which is not `Lever.NONE`: see `ep.observe` for that.

        The tensors of `routed` are not written.
        """
        asked = self._asked(routed, agreed.policy, lever)
        row_W, keys_TC = count_experts(
            asked.ids_TC,
            asked.weights_TC,
            asked.flags_T,
            asked.amounts_T,
            num_experts=self._topology.num_experts,
            topk=self._topology.topk,
            key_rule=asked.key_rule,
        )
        assert keys_TC is not None
        rows_RW = self._exchange.gather(row_W)
        by_source = agreed.policy.scope is Scope.SOURCE
        seen_RW = rows_RW[self._rank : self._rank + 1] if by_source else rows_RW
        capacity_G = self._capacities(seen_RW, agreed, routed.layer)
        cut = cut_to(
            capacity_G, asked, keys_TC, seen_RW, 0 if by_source else self._rank, self._topology
        )
        if asked.amounts_T is not None:
            self.macs.learn(routed.layer, rows_RW)
            if lever is Lever.DROP:
                scores_TE = _scores(routed, self._topology.num_experts)
                cut = reroute(cut, asked, scores_TE, self._topology, self._rank)
        weights_TC = cut.weights_TC
        if agreed.policy.renormalise:
            weights_TC = _renormalised(weights_TC, routed)
        return LayerOutcome(
            ids_TC=cut.ids_TC,
            weights_TC=weights_TC,
            counts_RW=rows_RW[:, : NUM_HEADER + NUM_COUNTS * self._topology.num_experts],
            stats_8=cut.stats_8,
        )

    def _asked(self, routed: LayerInput, policy: Policy, lever: Lever) -> Asked:
        ids_TC, weights_TC = routed.ids_TK, routed.weights_TK
        if lever is Lever.EXPAND:
            num_local = self._topology.experts_per_rank
            num_extra = min(num_local, MAX_COLUMNS - self._topology.topk)
            ids_TC, weights_TC = widen_candidates(
                routed.ids_TK,
                routed.weights_TK,
                _scores(routed, self._topology.num_experts),
                routed.flags_T,
                first_local=self._rank * num_local,
                num_local=num_local,
                num_extra=min(num_extra, policy.max_extra_experts or num_extra),
            )
        amounts_T = None
        if policy.rule is Rule.MACS:
            valid_T = (routed.ids_TK >= 0).any(dim=1)
            amounts_T = token_amounts(
                routed.hidden_TD, routed.flags_T, valid_T, delta=policy.macs_delta
            )
        key_rule = KeyRule(
            metric=int(policy.metric),
            preference=int(policy.preference),
            seed=routed.layer,
            routed_first=lever is Lever.EXPAND and policy.expansion is Expansion.FILL,
        )
        return Asked(
            ids_TC=ids_TC,
            weights_TC=weights_TC,
            flags_T=routed.flags_T,
            amounts_T=amounts_T,
            key_rule=key_rule,
        )

    def _capacities(self, seen_RW: torch.Tensor, agreed: Agreed, layer: int) -> torch.Tensor:
        policy = agreed.policy
        capacity = group_capacity(self._topology, agreed, self._rank)
        if policy.rule is Rule.MACS:
            return self.macs.capacities(layer, seen_RW, capacity, policy.macs_rho, policy.level)
        num_groups = num_groups_of(self._topology, policy.level)
        return torch.full((num_groups,), capacity, dtype=torch.int64, device=seen_RW.device)


def _scores(routed: LayerInput, num_experts: int) -> torch.Tensor:
    """The router's scores of all experts, `[T, E]` float32.

    SGLang gives a rank without tokens logits of the wrong width.
    """
    if routed.ids_TK.shape[0] == 0:
        return routed.weights_TK.new_empty(0, num_experts)
    logits_TE = routed.logits_TE.float()
    return logits_TE.sigmoid() if routed.scoring == "sigmoid" else logits_TE.softmax(dim=-1)


def _renormalised(weights_TC: torch.Tensor, routed: LayerInput) -> torch.Tensor:
    """Scale each token's weights to the sum they had before the cut; empty tokens stay empty.

    Protected tokens are left alone to the bit: sums over K and over C columns may round apart.
    """
    after_T = weights_TC.sum(dim=1)
    scale_T = torch.where(after_T > 0, routed.weights_TK.sum(dim=1) / after_T, 0.0)
    scale_T = torch.where((routed.flags_T & FLAG_PROTECTED) != 0, 1.0, scale_T)
    return weights_TC * scale_T[:, None]
