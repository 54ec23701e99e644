"""Laws of resident copies on real ranks: what is stored where, what is freed, what is computed.

Shape letters: T tokens, K top-k, N received rows, H hidden size, E experts, R ranks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_moelb.ep.low import fp8, marlin
from sglang_moelb.ep.resident.experts import ResidentExperts
from sglang_moelb.ep.resident.formats import FORMATS, NAMES, LowWeights
from sglang_moelb.ep.resident.weights import StoredLayer, high_bytes, only, store
from sglang_moelb.ep.standin.experts import run_experts
from sglang_moelb.ep.standin.low_experts import Fp8Experts, run_experts_fp8
from sglang_moelb.kernels.block_format import BlockFormat, fake_quantise_fp4
from sglang_moelb.kernels.quantise_rows import quantise_rows
from sglang_moelb.placement import LayerPlacement, Replica, layout, num_slots_of
from sglang_moelb.stored_formats import LOW_BYTES
from sglang_moelb.types import Topology

from .ranks import Ranks

pytestmark = pytest.mark.dist

HIDDEN, INNER, NUM_EXPERTS, TOPK = 128, 128, 8, 3
# From experts in full precision, relative. A low row is rounded four times in fp8 (rows, w13,
# activation, w2), each by 3 % in the mean; in mxfp4 weights only, three of them, each by 12 %.
APART = {"fp8": 0.08, "mxfp4": 0.22}
PLACEMENTS = {
    2: LayerPlacement(
        replicas=(Replica(expert=1, rank=1), Replica(expert=6, rank=0), Replica(expert=2, rank=1)),
        low_experts=(0, 3, 5, 7),
    ),
    4: LayerPlacement(
        replicas=(Replica(expert=0, rank=1), Replica(expert=0, rank=3), Replica(expert=5, rank=3)),
        low_experts=(1, 3, 4, 7),
    ),
}


class Rows(NamedTuple):
    """What DeepEP's dispatch gives, as far as it is read."""

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    num_recv_tokens_per_expert: list[int]

    @property
    def format(self) -> Any:
        return SimpleNamespace(is_deepep_ll=lambda: False)


class Done(NamedTuple):
    """What goes to the combine."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def weights(name: str) -> Tensor:
    """All experts' weights, the same in every process."""
    shape = (NUM_EXPERTS, 2 * INNER, HIDDEN) if name == "w13_weight" else (
        NUM_EXPERTS, HIDDEN, INNER,
    )  # fmt: skip
    drawn = torch.Generator().manual_seed(len(name))
    return (torch.randn(shape, generator=drawn) * 0.1).bfloat16()


class Layer(torch.nn.Module):
    """A MoE layer of SGLang's on one rank, whose method and runner are the reference's."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__()
        mine = slice(rank * NUM_EXPERTS // num_ranks, (rank + 1) * NUM_EXPERTS // num_ranks)
        for name in ("w13_weight", "w2_weight"):
            value = torch.nn.Parameter(weights(name)[mine].clone(), requires_grad=False)
            self.register_parameter(name, value)
        self.quant_method = SimpleNamespace(apply=self.apply_high, runner=self)

    def apply_high(self, layer: Any, dispatch_output: Rows) -> Done:
        assert len(dispatch_output.num_recv_tokens_per_expert) == len(layer.w13_weight)
        rows = run_experts(
            dispatch_output.hidden_states, dispatch_output.topk_ids, dispatch_output.topk_weights,
            layer.w13_weight, layer.w2_weight,
        )  # fmt: skip
        return Done(rows, dispatch_output.topk_ids, dispatch_output.topk_weights)

    def run(self, dispatch_output: Rows, low: fp8.Fp8Weights) -> Done:
        assert len(dispatch_output.num_recv_tokens_per_expert) == len(low.w13)
        assert dispatch_output.hidden_states_scale is not None
        rows = run_experts_fp8(
            dispatch_output.hidden_states, dispatch_output.hidden_states_scale,
            dispatch_output.topk_ids, dispatch_output.topk_weights,
            Fp8Experts(w13_eJH=low.w13, w13_scale=low.w13_scale, w2_eHI=low.w2,
                       w2_scale=low.w2_scale),
        )  # fmt: skip
        return Done(rows, dispatch_output.topk_ids, dispatch_output.topk_weights)


def topology(num_ranks: int) -> Topology:
    return Topology(num_layers=1, num_experts=NUM_EXPERTS, num_ranks=num_ranks, topk=TOPK)


def stored_on(
    group: dist.ProcessGroup, rank: int, name: str
) -> tuple[Layer, StoredLayer, Any, int]:
    num_ranks = dist.get_world_size(group)
    layer = Layer(rank, num_ranks)
    before = high_bytes([layer])
    placement = PLACEMENTS[num_ranks]
    place = layout(placement, topology(num_ranks), num_slots_of((placement,), num_ranks))
    stored = store(layer, place, rank=rank, group=group, low_format=FORMATS[name])
    return layer, stored, place, before


class ByReference:
    """The low run's reference in place of SGLang's runner and of its nouns."""

    def __enter__(self) -> None:
        self.before = fp8.run, marlin.to_combine
        fp8.run = lambda layer, rows, low: layer.run(rows, low)  # type: ignore[assignment]
        marlin.to_combine = lambda given, rows: Done(rows, given.topk_ids, given.topk_weights)

    def __exit__(self, *args: object) -> None:
        fp8.run, marlin.to_combine = self.before


def all_low(name: str) -> LowWeights:
    """All experts in format `name`."""
    whole = SimpleNamespace(**{weight: weights(weight) for weight in ("w13_weight", "w2_weight")})
    into: LowWeights = FORMATS[name].allocate(whole)
    for expert in range(NUM_EXPERTS):
        FORMATS[name].store(whole, expert, only(into, expert))
    return into


def check_stored(group: dist.ProcessGroup, rank: int, low_format: str) -> None:
    layer, stored, place, before = stored_on(group, rank, low_format)
    assert stored.num_high == len(place.high[rank])
    for name in ("w13_weight", "w2_weight"):
        parameter = dict(layer.named_parameters())[name]
        assert torch.equal(parameter.data, weights(name)[list(place.high[rank])])
    lows, expected = place.low[rank] + place.replicas[rank], all_low(low_format)
    assert stored.num_low == place.num_places - stored.num_high >= len(lows)
    for at, expert in enumerate(lows):
        assert stored.low is not None
        for name in NAMES:
            got, want = getattr(stored.low, name)[at], getattr(expected, name)[expert]
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (expert, name)
    num_low_own = len(place.low[rank])
    freed = before - high_bytes([layer])
    assert freed == num_low_own * 3 * HIDDEN * INNER * 2, "bfloat16 memory is really freed"
    low_bytes = stored.low.num_bytes if stored.low else 0
    assert low_bytes == stored.num_low * LOW_BYTES[low_format](3 * HIDDEN * INNER)


def outputs(
    group: dist.ProcessGroup, rank: int, given: tuple[str, tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """This rank's share of the layer's output for all tokens of all ranks, [R*T, H]."""
    name, (x_RTH, ids_RTK, weights_RTK) = given
    layer, stored, place, _ = stored_on(group, rank, name)
    num_ranks = dist.get_world_size(group)
    resident = [
        ResidentExperts([layer], [stored], [place], rank=source) for source in range(num_ranks)
    ]
    physical = [
        resident[source].physical(0, Chosen(ids_RTK[source])).topk_ids
        for source in range(num_ranks)
    ]
    ids_NK = torch.cat(physical)
    local_NK = ids_NK - rank * place.num_places
    local_NK = local_NK.where((local_NK >= 0) & (local_NK < place.num_places), -1)
    counts = local_NK[local_NK >= 0].bincount(minlength=place.num_places).tolist()
    rows = Rows(x_RTH.flatten(0, 1), None, local_NK, weights_RTK.flatten(0, 1), counts)
    with ByReference():
        done = resident[rank].run(layer, rows)
    assert torch.equal(done.topk_ids, local_NK)
    return done.hidden_states


class Chosen(NamedTuple):
    topk_ids: Tensor


def routing(num_ranks: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(5)
    num_tokens = 0 if kind == "no tokens" else 20
    x_RTH = torch.randn(num_ranks, num_tokens, HIDDEN, generator=drawn).bfloat16()
    logits = torch.randn(num_ranks, num_tokens, NUM_EXPERTS, generator=drawn)
    weights_RTK, ids_RTK = logits.softmax(dim=-1).topk(TOPK, dim=-1)
    if kind == "one expert":
        ids_RTK = torch.full_like(ids_RTK, -1)
        ids_RTK[..., 0] = 0
    elif kind == "padded":
        ids_RTK[:, -6:] = -1
    elif kind == "high only":
        ids_RTK = torch.tensor([6, 2, 6]).expand_as(ids_RTK).clone()
    return x_RTH, ids_RTK, weights_RTK.where(ids_RTK >= 0, 0.0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_each_rank_stores_what_the_placement_says_and_frees_the_rest(
    ranks: Ranks, num_ranks: int, name: str
) -> None:
    ranks.run(check_stored, [name] * num_ranks)


@pytest.mark.parametrize("kind", ["random", "one expert", "padded", "no tokens", "high only"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_computed_once_by_a_copy_of_its_expert(
    ranks: Ranks, name: str, num_ranks: int, kind: str
) -> None:
    routed = routing(num_ranks, kind)
    found = sum(x.float() for x in ranks.run(outputs, [(name, routed)] * num_ranks))
    expected = computed_as_planned(routed, num_ranks, name)
    assert found.shape == expected.shape
    if not expected.numel():
        return
    # Each rank's part is rounded to bfloat16 before the sum, as DeepEP sends it: 2**-9 each.
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    assert not found[(routed[1] < 0).all(dim=-1).flatten()].any()
    exact = run_high(*(x.flatten(0, 1) for x in routed))
    assert (found - exact).norm() <= APART[name] * exact.norm()
    if kind == "high only" and num_ranks == 4:
        assert (found - exact).norm() <= 2**-7 * exact.norm(), "no low copy was asked"


def run_high(x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    w13, w2 = weights("w13_weight").float(), weights("w2_weight").float()
    return run_experts(x_NH.float(), ids_NK, weights_NK, w13, w2)


def computed_as_planned(
    routed: tuple[Tensor, Tensor, Tensor], num_ranks: int, name: str
) -> Tensor:
    """The layer's output, with each row at the precision of the copy whose turn it is."""
    placement = PLACEMENTS[num_ranks]
    holders: list[list[int]] = [[] for _ in range(NUM_EXPERTS)]
    for replica in sorted(placement.replicas, key=lambda one: one.rank):
        holders[replica.expert].append(replica.rank)
    x_NH, ids_NK, weights_NK = (x.flatten(0, 1) for x in routed)
    is_low_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    num_tokens = routed[1].shape[1]
    for row, column in (ids_NK >= 0).nonzero().tolist():
        source, token = divmod(row, num_tokens)
        expert = int(ids_NK[row, column])
        turn = (token + source) % (1 + len(holders[expert]))
        is_low_NK[row, column] = turn > 0 or expert in placement.low_experts
    low_NH = run_low(x_NH, ids_NK.where(is_low_NK, -1), weights_NK, name)
    return run_high(x_NH, ids_NK.where(~is_low_NK, -1), weights_NK) + low_NH


def run_low(x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, name: str) -> Tensor:
    """All rows by low experts; of mxfp4 in float32 by the weights that its bytes stand for."""
    if name == "mxfp4":
        stored = (weights("w13_weight"), weights("w2_weight"))
        w13, w2 = (fake_quantise_fp4(one, BlockFormat.MXFP4_CEIL).float() for one in stored)
        return run_experts(x_NH.float(), ids_NK, weights_NK, w13, w2)
    low = all_low(name)
    q_NH, scale = quantise_rows(x_NH)
    experts = Fp8Experts(
        w13_eJH=low.w13, w13_scale=low.w13_scale, w2_eHI=low.w2, w2_scale=low.w2_scale
    )
    return run_experts_fp8(q_NH, scale, ids_NK, weights_NK, experts).float()
