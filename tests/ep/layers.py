"""Routings of one MoE layer on several ranks, and the balancer's run over them.

Shape letters: T rows of a rank, K top-k, C columns, E experts, D hidden size, R ranks, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.balance import LayerBalancer, LayerInput
from sglang_moelb.ep.exchange import Exchange
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION
from sglang_moelb.types import Level, Lever, Policy, Topology

NUM_EXPERTS, TOPK, HIDDEN_SIZE = 8, 3, 16
ROUTINGS = (
    "random",
    "skewed",
    "ties",
    "one-expert",
    "last-expert",
    "idle-rank",
    "one-token",
    "padded",
    "no-protected",
    "all-protected",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank got back from the balancer."""

    ids_TC: torch.Tensor
    weights_TC: torch.Tensor
    counts_RW: torch.Tensor
    stats_8: list[int]


def topology(num_ranks: int) -> Topology:
    """Eight experts, top-3, two layers."""
    return Topology(num_layers=2, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK)


def layer_input(
    num_tokens: int, seed: int, *, popularity_E: torch.Tensor | None = None, layer: int = 0
) -> LayerInput:
    """Top-k of a softmax over random logits; half of the tokens vision, a sixth protected, of
    which half are refused."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    if popularity_E is not None:
        logits_TE += popularity_E
    weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(TOPK, dim=-1)
    flags_T = (torch.rand(num_tokens, generator=generator) < 0.5).to(torch.uint8) * FLAG_VISION
    drawn_T = torch.rand(num_tokens, generator=generator)
    flags_T |= (drawn_T < 1 / 6).to(torch.uint8) * FLAG_PROTECTED
    flags_T |= (drawn_T < 1 / 12).to(torch.uint8) * FLAG_REFUSED
    hidden_TD = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    hidden_TD *= 1 + 4 * torch.rand(num_tokens, 1, generator=generator)
    return LayerInput(
        layer=layer,
        ids_TK=ids_TK,
        weights_TK=weights_TK / weights_TK.sum(dim=-1, keepdim=True),
        # A rank without tokens gets logits as wide as the top-k from SGLang.
        logits_TE=logits_TE if num_tokens else torch.empty(0, TOPK),
        hidden_TD=hidden_TD,
        flags_T=flags_T,
        scoring="softmax",
    )


def routing(name: str, num_ranks: int, seed: int = 0) -> list[LayerInput]:
    """One of `ROUTINGS`, one input a rank."""
    sizes = [40 + 17 * rank for rank in range(num_ranks)]
    popularity_E = None
    if name == "skewed":
        popularity_E = torch.tensor([4.0, 2.0] + [0.0] * (NUM_EXPERTS - 2))
    elif name == "idle-rank":
        sizes[0] = 0
        sizes[-1] = 90
    elif name == "one-token":
        sizes = [0] * (num_ranks - 1) + [1]
    inputs = [
        layer_input(n, 100 * seed + rank, popularity_E=popularity_E)
        for rank, n in enumerate(sizes)
    ]
    return [_shaped(name, one) for one in inputs]


def _shaped(name: str, one: LayerInput) -> LayerInput:
    ids_TK, weights_TK, flags_T = one.ids_TK.clone(), one.weights_TK.clone(), one.flags_T.clone()
    if name == "ties":
        weights_TK.fill_(1 / TOPK)
    elif name in ("one-expert", "last-expert"):
        ids_TK[:] = -1
        ids_TK[:, 0] = 2 if name == "one-expert" else NUM_EXPERTS - 1
        weights_TK[:, 1:] = 0.0
    elif name == "padded":
        ids_TK[-5:], weights_TK[-5:] = -1, 0.0
        ids_TK[::7, 1], weights_TK[::7, 1] = -1, 0.0
    elif name == "all-protected":
        flags_T |= FLAG_PROTECTED
    if name in ("no-protected", "one-token", "one-expert"):
        flags_T &= FLAG_VISION
    return _with(one, ids_TK=ids_TK, weights_TK=weights_TK, flags_T=flags_T)


def _with(one: LayerInput, **changes: Any) -> LayerInput:
    fields = {name: getattr(one, name) for name in LayerInput.__slots__}
    return LayerInput(**{**fields, **changes})


def reflagged(one: LayerInput, flags_T: torch.Tensor) -> LayerInput:
    """`one` with other flags."""
    return _with(one, flags_T=flags_T)


def agreed_on(policy: Policy, inputs: Sequence[LayerInput]) -> Agreed:
    """What the ranks would hold after the agreement of a prefill pass."""
    return Agreed(policy=policy, sizes_R=tuple(_sizes(one) for one in inputs))


def _sizes(one: LayerInput) -> Sizes:
    num_tokens = num_tokens_of(one)
    return Sizes(num_tokens=num_tokens, num_prefill_tokens=num_tokens, phase="prefill")


def num_tokens_of(one: LayerInput) -> int:
    """Tokens that are not padding."""
    return int((one.ids_TK >= 0).any(dim=1).sum())


def capacity_of(policy: Policy, num_tokens: int, num_groups: int) -> int:
    """floor(factor * tokens * k / groups), at least 1, nothing for nothing."""
    if num_tokens == 0:
        return 0
    return max(1, int(policy.capacity_factor * num_tokens * TOPK / num_groups + 1e-9))


def num_groups_of(policy: Policy, num_ranks: int) -> int:
    """Experts or ranks."""
    return NUM_EXPERTS if policy.level is Level.EXPERT else num_ranks


def run_layers(
    group: dist.ProcessGroup, rank: int, payload: tuple[Topology, list[LayerInput], Agreed, Lever]
) -> list[Outcome]:
    """On a rank: one balancer over some layers in turn."""
    sizes, layers, agreed, lever = payload
    balancer = LayerBalancer(sizes, rank, Exchange(group))
    outcomes = []
    for routed in layers:
        before = [t.clone() for t in (routed.ids_TK, routed.weights_TK, routed.flags_T)]
        out = balancer.run(routed, agreed, lever)
        after = (routed.ids_TK, routed.weights_TK, routed.flags_T)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "input written"
        outcomes.append(
            Outcome(
                ids_TC=out.ids_TC,
                weights_TC=out.weights_TC,
                counts_RW=out.counts_RW,
                stats_8=out.stats_8.tolist(),
            )
        )
    return outcomes


def balance(
    ranks: Any, inputs: Sequence[LayerInput], policy: Policy, lever: Lever
) -> list[Outcome]:
    """One layer on `len(inputs)` real ranks; one outcome a rank."""
    agreed = agreed_on(policy, inputs)
    sizes = topology(len(inputs))
    payloads = [(sizes, [one], agreed, lever) for one in inputs]
    return [outcomes[0] for outcomes in ranks.run(run_layers, payloads)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One assignment of a token to an expert."""

    rank: int
    token: int
    column: int
    expert: int
    weight: float
    vision: bool
    protected: bool
    kept: bool


def rows_of(inputs: Sequence[LayerInput], outcomes: Sequence[Outcome]) -> list[Row]:
    """Every routed row before the lever, and whether it is there after."""
    rows = []
    for rank, (one, out) in enumerate(zip(inputs, outcomes, strict=True)):
        flags = one.flags_T.tolist()
        kept = out.ids_TC[:, :TOPK].tolist()
        weights = one.weights_TK.tolist()
        for token, experts in enumerate(one.ids_TK.tolist()):
            rows += [
                Row(
                    rank=rank,
                    token=token,
                    column=column,
                    expert=expert,
                    weight=weights[token][column],
                    vision=bool(flags[token] & FLAG_VISION),
                    protected=bool(flags[token] & FLAG_PROTECTED),
                    kept=kept[token][column] == expert,
                )
                for column, expert in enumerate(experts)
                if expert >= 0
            ]
    return rows
