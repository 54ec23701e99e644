"""Laws of resident copies in DeepEP's low-latency mode, as decode runs: each row once, by its copy.

Shape letters: P places of a rank, M rows of room, N rows, H hidden size, T tokens, K top-k.
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
from sglang_moelb.ep.resident.formats import FORMATS
from sglang_moelb.ep.resident.masked import run_masked
from sglang_moelb.ep.resident.weights import StoredLayer
from sglang_moelb.ep.standin.deep_ep_low_latency import LowLatencyBuffer
from sglang_moelb.ep.standin.experts import run_experts
from sglang_moelb.ep.standin.low_experts import Fp8Experts, run_experts_fp8
from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap
from sglang_moelb.kernels.quantise_rows import quantise_rows

from .ranks import Ranks
from .test_resident import (
    APART,
    HIDDEN,
    INNER,
    Chosen,
    computed_as_planned,
    routing,
    run_high,
    stored_on,
)

MAX_ROWS, TOPK = 24, 3
ROOM = 32  # for tokens of a rank, in the whole path
NUMBERS = {
    "none": [0, 0, 0, 0, 0],
    "one row of a high one": [0, 1, 0, 0, 0],
    "one row of a low one": [0, 0, 0, 1, 0],
    "high only": [7, 24, 0, 0, 0],
    "low only": [0, 0, 0, 24, 7],
    "full": [24] * 5,
    "mixed": [3, 0, 17, 1, 24],
}


def reference_runner() -> Any:
    """SGLang's runner on the host."""
    close_torchvision_gap()
    pytest.importorskip("sglang")
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

    from sglang_moelb.ep.standin.runner_core import ReferenceRunnerCore

    config = MoeRunnerConfig(top_k=TOPK, params_dtype=torch.bfloat16)
    core = ReferenceRunnerCore(config)
    return SimpleNamespace(run=lambda rows, quant: core.run_from_dispatch(rows, quant, config))


class Method:
    """SGLang's method of an unquantised layer, counting its runs and the low ones."""

    def __init__(self) -> None:
        runner = reference_runner()
        self.num_runs = 0

        def run(rows: Any, quant: Any) -> Any:
            self.num_runs += 1
            return runner.run(rows, quant)

        self.runner = SimpleNamespace(run=run)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        quant = SimpleNamespace(
            w13_weight=layer.w13_weight, w2_weight=layer.w2_weight, use_fp8=False
        )
        return self.runner.run(dispatch_output, quant)


def make_layer(num_places: int, num_high: int) -> tuple[Any, StoredLayer]:
    """A layer whose places from `num_high` on are low."""
    drawn = torch.Generator().manual_seed(num_high)

    def draw(*shape: int) -> Tensor:
        return (0.1 * torch.randn(num_places, *shape, generator=drawn)).bfloat16()

    whole = SimpleNamespace(w13_weight=draw(2 * INNER, HIDDEN), w2_weight=draw(HIDDEN, INNER))
    tail = SimpleNamespace(**{name: part[num_high:] for name, part in vars(whole).items()})
    low = fp8.allocate(tail)
    fp8.convert(tail, low, torch.ones(num_places - num_high, dtype=torch.int32))
    layer = SimpleNamespace(
        w13_weight=whole.w13_weight[:num_high], w2_weight=whole.w2_weight[:num_high],
        quant_method=Method(), whole=whole,
    )  # fmt: skip
    return layer, StoredLayer(num_high=num_high, num_low=num_places - num_high, low=low)


def received(numbers: list[int]) -> Any:
    """What DeepEP's low-latency dispatch gives; room holds anything."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput

    drawn = torch.Generator().manual_seed(sum(numbers))
    rows_PMH = torch.randn(len(numbers), MAX_ROWS, HIDDEN, generator=drawn).bfloat16()
    for place, count in enumerate(numbers):
        rows_PMH[place, count:] = float("nan")
    return DeepEPLLDispatchOutput(
        hidden_states=rows_PMH,
        hidden_states_scale=None,
        topk_ids=torch.zeros(2, TOPK, dtype=torch.int64),
        topk_weights=torch.ones(2, TOPK),
        masked_m=torch.tensor(numbers, dtype=torch.int32),
        expected_m=4,
    )


def alone(rows_NH: Tensor, layer: Any, stored: StoredLayer, place: int) -> Tensor:
    """The rows of one place by the plain reference of its precision."""
    ids_N1 = torch.zeros(len(rows_NH), 1, dtype=torch.int64)
    ones_N1 = torch.ones(len(rows_NH), 1)
    if place < stored.num_high:
        weights = (layer.w13_weight[place : place + 1], layer.w2_weight[place : place + 1])
        return run_experts(rows_NH, ids_N1, ones_N1, *weights)
    low, pick = stored.low, slice(place - stored.num_high, place - stored.num_high + 1)
    assert low is not None
    experts = Fp8Experts(w13_eJH=low.w13[pick], w13_scale=low.w13_scale[pick],
                         w2_eHI=low.w2[pick], w2_scale=low.w2_scale[pick])  # fmt: skip
    return run_experts_fp8(*quantise_rows(rows_NH), ids_N1, ones_N1, experts)


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("num_high", [1, 3])
def test_each_place_runs_its_rows_at_its_precision_in_two_runs_whatever_has_come(
    numbers: list[int], num_high: int
) -> None:
    layer, stored = make_layer(len(numbers), num_high)
    given = received(numbers)
    done = run_masked(layer, received(numbers), stored)
    assert layer.quant_method.num_runs == 2, "a graph cannot leave one out"
    assert done.hidden_states.shape == given.hidden_states.shape
    assert done.hidden_states.dtype is torch.bfloat16
    assert done.topk_ids.shape == given.topk_ids.shape
    for place, count in enumerate(numbers):
        rows_NH, out_NH = (x[place, :count] for x in (given.hidden_states, done.hidden_states))
        assert torch.equal(out_NH, alone(rows_NH, layer, stored, place)), place
        weights = (x[place : place + 1].float() for x in vars(layer.whole).values())
        ids_N1 = torch.zeros(count, 1, dtype=torch.int64)
        exact_NH = run_experts(rows_NH.float(), ids_N1, torch.ones(count, 1), *weights)
        # bfloat16 rounds both GEMMs and the activation, float8 rows and weights besides.
        bound = 2**-7 if place < num_high else 0.08
        assert (out_NH.float() - exact_NH).norm() <= bound * exact_NH.norm()


def test_without_low_places_sglang_runs_the_layer_in_one_run() -> None:
    layer, stored = make_layer(5, 3)
    numbers = NUMBERS["mixed"][:3]
    done = run_masked(layer, received(numbers), StoredLayer(num_high=3, num_low=0, low=None))
    assert layer.quant_method.num_runs == 1
    given = received(numbers).hidden_states
    assert torch.equal(done.hidden_states[2, :17], alone(given[2, :17], layer, stored, 2))


class Rows(NamedTuple):
    """SGLang's low-latency dispatch output and combine input, in processes without SGLang."""

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    masked_m: Tensor
    expected_m: int = 1

    @property
    def format(self) -> Any:
        return SimpleNamespace(is_deepep_ll=lambda: True)


def run_places(layer: Any, rows: Rows, stored: StoredLayer, first_place: int) -> Rows:
    """`alone` on each place's rows."""
    out_PMH = torch.full(rows.hidden_states.shape, float("nan"), dtype=torch.bfloat16)
    for place, count in enumerate(rows.masked_m.tolist()):
        given = rows.hidden_states[place, :count]
        if rows.hidden_states_scale is not None:  # back to what they were quantised from, nearly
            scale = rows.hidden_states_scale[place, :count]
            given = (given.float() * scale.repeat_interleave(128, dim=1)).bfloat16()
        out_PMH[place, :count] = alone(given, layer, stored, first_place + place)
    return rows._replace(hidden_states=out_PMH)


def decoded(
    group: dist.ProcessGroup, rank: int, given: tuple[str, tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """This rank's tokens through the whole layer: mapped, sent, computed, combined, `[T, H]`."""
    name, routed = given
    layer, stored, place, _ = stored_on(group, rank, name)
    layer.quant_method.apply = lambda layer, dispatch_output: run_places(
        layer, dispatch_output, stored, 0
    )
    resident = ResidentExperts([layer], [stored], [place], rank=rank)
    buffer = LowLatencyBuffer(group, low_latency_mode=True)
    x_TH, ids_TK, weights_TK = (x[rank].contiguous() for x in routed)
    ids_TK = resident.physical(0, Chosen(ids_TK)).topk_ids
    num_experts = dist.get_world_size(group) * place.num_places
    rows, counts, handle, _, arrived = buffer.low_latency_dispatch(
        x_TH, ids_TK, ROOM, num_experts, use_fp8=False, return_recv_hook=True
    )
    arrived()
    before = fp8.run, marlin.to_combine
    fp8.run = lambda layer, rows, low: run_places(  # type: ignore[assignment]
        layer, rows, stored, stored.num_high
    )
    marlin.to_combine = lambda given, out_PMH: given._replace(hidden_states=out_PMH)
    try:
        done = resident.run(layer, Rows(rows, None, ids_TK, weights_TK, counts))
    finally:
        fp8.run, marlin.to_combine = before
    out_TH, _, arrived = buffer.low_latency_combine(
        done.hidden_states, done.topk_ids, done.topk_weights, handle, return_recv_hook=True
    )
    arrived()
    return out_TH


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["random", "one expert", "padded", "no tokens", "high only"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_a_decoded_token_meets_each_of_its_experts_once_by_the_copy_whose_turn_it_is(
    ranks: Ranks, name: str, num_ranks: int, kind: str
) -> None:
    routed = routing(num_ranks, kind)
    if kind == "high only":
        routed[1][..., 2] = -1  # there an expert is selected twice
        routed[2][..., 2] = 0.0
    found = torch.cat(ranks.run(decoded, [(name, routed)] * num_ranks)).float()
    expected = computed_as_planned(routed, num_ranks, name)
    assert found.shape == expected.shape
    if not expected.numel():
        return
    # Each expert's row is rounded to bfloat16 before the sum, as DeepEP sends it: 2**-9 each.
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    assert not found[(routed[1] < 0).all(dim=-1).flatten()].any()
    exact = run_high(*(x.flatten(0, 1) for x in routed))
    assert (found - exact).norm() <= APART[name] * exact.norm()
