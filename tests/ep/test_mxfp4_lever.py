"""Laws of MXFP4 under the lever on data-centre Blackwell, by emulation (`sm100`).

The reference is written from the definitions: each row's logical expert, on weights in MXFP4 and
rows in float8 with powers of two. Shape letters: K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.low import attach, mxfp4
from sglang_moelb.ep.low.fp4 import Fp4Weights
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.memory import MemoryLedger
from sglang_moelb.ep.standin.experts import run_experts

from .moe_layers import lora, make_layer, offload  # noqa: F401 - fixtures for all tests here
from .sm100 import DeepGemm, blackwell, quantise_128, sglang_runner

E_LOCAL, HIDDEN, INNER = 4, 640, 128  # five groups of 128 and one: words are not full
DOWNGRADE = merge(Config(), {"mode": "downgrade"})
Values = Callable[[torch.Tensor], torch.Tensor]
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def start_on_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the start of the lever take bare layers for a model."""
    pytest.importorskip("sglang.srt.layers.moe.moe_runner.runner")
    monkeypatch.setattr(attach, "expert_layers", lambda model: model)
    monkeypatch.setattr(attach, "_ledger", lambda model_runner, staging: MemoryLedger())


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    start_on_layers(monkeypatch)
    return blackwell(monkeypatch)


def weighted_layer(seed: int) -> Any:
    """A layer with weights, SGLang's runner, and the reference for its own precision."""
    generator = torch.Generator().manual_seed(seed)
    layer = make_layer(hidden=HIDDEN, inner=INNER, num_experts=E_LOCAL)
    for weight in (layer.w13_weight, layer.w2_weight):
        spread = torch.logspace(-2, 0, weight.shape[2])  # blocks of a row have scales of their own
        weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) * spread)
        weight *= torch.logspace(-1, 0.5, weight.shape[1])[:, None]
    layer.quant_method.runner = sglang_runner()
    layer.quant_method.apply = lambda layer, dispatch_output: _combined(dispatch_output, layer)
    return layer


def _combined(rows: Any, layer: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalCombineInput

    out = run_experts(
        rows.hidden_states, rows.topk_ids, rows.topk_weights, layer.w13_weight, layer.w2_weight
    )
    return DeepEPNormalCombineInput(out, rows.topk_ids, rows.topk_weights)


def received(counts: list[int], seed: int = 3) -> Any:
    """Rows for the experts of this rank, `counts` for each as a row's first or second choice."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    generator = torch.Generator().manual_seed(seed)
    wanted = [expert for expert, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(wanted), generator=generator).tolist()
    chosen: list[list[int]] = []
    for place in order:  # a second choice where another row's first leaves room
        if chosen and chosen[-1][1] < 0 and chosen[-1][0] != wanted[place] and place % 3:
            chosen[-1][1] = wanted[place]
        else:
            chosen.append([wanted[place], -1])
    ids_NK = torch.tensor(chosen, dtype=torch.int64)
    x = torch.randn(len(chosen), HIDDEN, generator=generator) * torch.logspace(-2, 1, HIDDEN)
    return DeepEPNormalDispatchOutput(
        hidden_states=x.bfloat16(),
        hidden_states_scale=None,
        topk_ids=ids_NK,
        topk_weights=torch.rand(ids_NK.shape, generator=generator),
        num_recv_tokens_per_expert=[-(-count // 128) * 128 for count in counts],
    )


def in_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """Values: a power of two a block of 32 that keeps it within 6, the nearest code, ties to even.
    """
    blocks = weight.double().unflatten(-1, (-1, 32))
    scale = torch.exp2((blocks.abs().amax(-1, keepdim=True).clamp(min=2**-120) / 6).log2().ceil())
    apart = (blocks.abs() / scale)[..., None] - MAGNITUDES
    apart = apart.abs() + torch.arange(8) % 2 * 1e-9  # an odd code loses a tie
    return (MAGNITUDES[apart.argmin(-1)] * blocks.sign() * scale).flatten(-2).float()


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    values, byte = quantise_128(x)
    return values.float() * torch.exp2(byte.float() - 127).repeat_interleave(128, dim=-1)


def by_definition(
    layer: Any, rows: Any, low: tuple[int, ...], *, of_rows: Values = in_fp8,
    of_weights: Values = in_mxfp4,
) -> torch.Tensor:  # fmt: skip
    """Each row's experts, those of `low` on values of the format."""
    out = torch.zeros(rows.hidden_states.shape)
    for expert in range(E_LOCAL):
        taken, columns = (rows.topk_ids == expert).nonzero(as_tuple=True)
        w13, w2 = layer.w13_weight[expert].float(), layer.w2_weight[expert].float()
        x = rows.hidden_states[taken]
        if expert in low:
            x, w13, w2 = of_rows(x), of_weights(w13), of_weights(w2)
        gate, up = (x.float() @ w13.T).bfloat16().float().chunk(2, dim=1)
        act = (F.silu(gate) * up).bfloat16()
        act = of_rows(act) if expert in low else act.float()
        down = (act @ w2.T).bfloat16().float()
        out.index_add_(0, taken, down * rows.topk_weights[taken, columns][:, None])
    return out


def attached(layers: list[Any], **downgrade: Any) -> DowngradeLever:
    """The lever as the start of a server makes it."""
    config = merge(DOWNGRADE, {"downgrade": downgrade})
    _, lever, _ = attach.attach_downgrade(SimpleNamespace(model=layers), config, 0, None)
    assert lever is not None
    return lever


def plan(*low: int) -> torch.Tensor:
    low_E = torch.zeros(2 * E_LOCAL, dtype=torch.int32)
    low_E[list(low)] = 1
    return low_E


def lowered(layer: Any, rows: Any, low: tuple[int, ...], **downgrade: Any) -> torch.Tensor:
    lever = attached([layer], **downgrade)
    lever.prepare(0, plan(*low))
    return lever.run(layer, _copy(rows)).hidden_states.float()


def _copy(rows: Any) -> Any:
    """SGLang frees the rows that it is given."""
    return rows._replace(hidden_states=rows.hidden_states.clone(), topk_ids=rows.topk_ids.clone())


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


COUNTS = [[50, 60, 40, 30], [1, 0, 0, 0], [0, 127, 0, 128], [129, 1, 127, 0], [256, 0, 3, 1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_lowered_rank_computes_each_rows_experts_on_values_of_the_format(
    double: DeepGemm, counts: list[int]
) -> None:
    layer, rows = weighted_layer(1), received(counts)
    everyone = (0, 1, 2, 3)
    found = lowered(layer, rows, everyone, format="mxfp4")
    expected = by_definition(layer, rows, everyone)
    assert off(found, expected) < 0.004
    assert 0.03 < off(found, by_definition(layer, rows, ())) < 0.3
    num_rows = sum(-(-count // 128) * 128 for count in counts)
    assert double.calls == [(num_rows, 2 * INNER, HIDDEN), (num_rows, HIDDEN, INNER)]


@pytest.mark.parametrize("low", [(0,), (1, 3), (0, 1, 2)])
def test_experts_of_both_precisions_add_up(double: DeepGemm, low: tuple[int, ...]) -> None:
    layer, rows = weighted_layer(1), received([129, 60, 127, 1])
    found = lowered(layer, rows, low)
    assert off(found, by_definition(layer, rows, low)) < 0.004
    others = by_definition(layer, rows, tuple({0, 1, 2, 3} - set(low)))
    assert off(found, others) > 0.02


@pytest.mark.parametrize("resident", ["", "all"])
def test_layers_take_their_own_weights_from_slots_and_copies(
    double: DeepGemm, resident: str
) -> None:
    layers = [weighted_layer(seed) for seed in range(3)]
    lever = attached(layers, slots=1, resident_layers=resident)
    for number in (0, 2, 1):
        rows = received([20, 30, 10, 40], seed=number)
        lever.prepare(number, plan(0, 1, 2, 3))
        found = lever.run(layers[number], _copy(rows)).hidden_states.float()
        assert off(found, by_definition(layers[number], rows, (0, 1, 2, 3))) < 0.004


def test_a_slot_holds_codes_and_scales_and_is_written_where_the_plan_asks(
    double: DeepGemm,
) -> None:
    layer = weighted_layer(1)
    weights = mxfp4.allocate(layer)
    num_weights = layer.w13_weight.numel() + layer.w2_weight.numel()
    of_scales = 4 * E_LOCAL * (2 * INNER * (HIDDEN // 128) + HIDDEN * (INNER // 128))
    assert weights.num_bytes == num_weights // 2 + of_scales
    mxfp4.convert(layer, weights, torch.tensor([0, 1, 0, 1], dtype=torch.int32), 2)
    for part in (weights.w13, weights.w2):
        assert part.codes.flatten(1).any(1).tolist() == [False, True, False, True]
        assert part.scales.flatten(1).any(1).tolist() == [False, True, False, True]


def swapped_nibbles(weights: Fp4Weights) -> Fp4Weights:
    codes = (weights.w13.codes >> 4) | (weights.w13.codes << 4)
    return replace(weights, w13=replace(weights.w13, codes=codes))


def neighbours_scales(weights: Fp4Weights) -> Fp4Weights:
    scales = weights.w2.scales
    moved = torch.empty_strided(scales.shape, scales.stride(), dtype=scales.dtype)
    return replace(weights, w2=replace(weights.w2, scales=moved.copy_(scales.roll(1, dims=1))))


def bytes_reversed(weights: Fp4Weights) -> Fp4Weights:
    scales = weights.w13.scales
    other = torch.zeros_like(scales)
    for place in range(4):
        other |= ((scales >> (8 * place)) & 255) << (24 - 8 * place)
    return replace(weights, w13=replace(weights.w13, scales=other))


def next_experts(weights: Fp4Weights) -> Fp4Weights:
    return replace(weights, w13=replace(weights.w13, codes=weights.w13.codes.roll(1, dims=0)))


SPOILS = [swapped_nibbles, neighbours_scales, bytes_reversed, next_experts]


@pytest.mark.parametrize("spoil", SPOILS)
def test_weights_in_another_layout_are_found(
    double: DeepGemm, spoil: Callable[[Fp4Weights], Fp4Weights]
) -> None:
    layer, rows = weighted_layer(1), received([50, 60, 40, 30])
    expected = by_definition(layer, rows, (0, 1, 2, 3))
    weights = mxfp4.allocate(layer)
    mxfp4.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    good = mxfp4.run(layer, mxfp4.quantised(rows), weights).hidden_states.float()
    wrong = mxfp4.run(layer, mxfp4.quantised(rows), spoil(weights)).hidden_states.float()
    assert off(good, expected) < 0.004
    assert off(wrong, expected) > 0.05


def test_scales_in_rows_and_rows_with_other_scales_are_refused_by_the_gemm(
    double: DeepGemm,
) -> None:
    layer, rows = weighted_layer(1), received([50, 60, 40, 30])
    weights = mxfp4.allocate(layer)
    mxfp4.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    in_rows = replace(weights.w13, scales=weights.w13.scales.contiguous())
    with pytest.raises(AssertionError):
        mxfp4.run(layer, mxfp4.quantised(rows), replace(weights, w13=in_rows))
    as_float = mxfp4.quantised(rows)
    as_float = as_float._replace(hidden_states_scale=as_float.hidden_states_scale.float())
    with pytest.raises(AssertionError):
        mxfp4.run(layer, as_float, weights)


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_the_start_takes_mxfp4_there_says_that_it_has_not_run_and_tells_it_in_the_status(
    double: DeepGemm,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
) -> None:
    blackwell(monkeypatch, capability)
    with caplog.at_level(logging.WARNING, logger="sglang_moelb"):
        lever = attached([weighted_layer(1)])
    assert lever.told()["format"] == "mxfp4"
    assert "downgrade.format mxfp4 has not yet been run on compute capability 10." in caplog.text
