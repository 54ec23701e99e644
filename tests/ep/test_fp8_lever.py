"""Laws of FP8 under the lever on Hopper by the number of an expert's rows, by emulation (`sm90`).

The reference is written from the definitions: each row's logical expert, on rows in float8 with
scales of 128 columns and weights with scales of 128x128.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_moelb.ep.low import fp8

from .moe_layers import lora, offload  # noqa: F401 - fixtures for all tests here
from .sm90 import DeepGemm, hopper, quantise_128
from .test_mxfp4_lever import (
    COUNTS,
    E_LOCAL,
    HIDDEN,
    INNER,
    attached,
    by_definition,
    lowered,
    off,
    plan,
    received,
    start_on_layers,
    weighted_layer,
)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    start_on_layers(monkeypatch)
    return hopper(monkeypatch)


def of_rows(x: torch.Tensor) -> torch.Tensor:
    values, scale = quantise_128(x)
    return values.float() * scale.repeat_interleave(128, dim=-1)


def of_weights(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    values = (blocks * (1 / scale)).to(torch.float8_e4m3fn).float() * scale
    return values.flatten(2).flatten(0, 1)


def expected(layer: Any, rows: Any, low: tuple[int, ...]) -> torch.Tensor:
    return by_definition(layer, rows, low, of_rows=of_rows, of_weights=of_weights)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_lowered_rank_computes_each_rows_experts_on_values_of_the_format(
    double: DeepGemm, counts: list[int]
) -> None:
    layer, rows = weighted_layer(1), received(counts)
    everyone = (0, 1, 2, 3)
    found = lowered(layer, rows, everyone, format="auto")
    assert off(found, expected(layer, rows, everyone)) < 0.004
    assert 0.01 < off(found, expected(layer, rows, ())) < 0.1
    num_rows = sum(-(-count // 128) * 128 for count in counts)
    assert double.calls == [(num_rows, 2 * INNER, HIDDEN), (num_rows, HIDDEN, INNER)]


@pytest.mark.parametrize("low", [(0,), (1,), (2,), (3,), (1, 3), (0, 1, 2)])
def test_experts_of_both_precisions_add_up(double: DeepGemm, low: tuple[int, ...]) -> None:
    layer, rows = weighted_layer(1), received([129, 128, 127, 1])
    found = lowered(layer, rows, low)
    assert off(found, expected(layer, rows, low)) < 0.004
    others = tuple({0, 1, 2, 3} - set(low))
    assert off(found, expected(layer, rows, others)) > 0.03
    num_rows = sum(rows.num_recv_tokens_per_expert[expert] for expert in low)
    assert double.calls == [(num_rows, 2 * INNER, HIDDEN), (num_rows, HIDDEN, INNER)]


def test_a_rank_whose_low_experts_have_no_rows_is_left_to_sglang(double: DeepGemm) -> None:
    layer, rows = weighted_layer(1), received([129, 0, 127, 1])
    lever = attached([layer])
    lever.prepare(0, plan(1))
    assert lever.run(layer, rows) is None
    assert double.calls == []


@pytest.mark.parametrize("part", ["w13_scale", "w2_scale"])
def test_scales_of_other_blocks_are_found(double: DeepGemm, part: str) -> None:
    layer, rows = weighted_layer(1), received([128, 127, 1, 129])
    weights = fp8.allocate(layer)
    fp8.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    scale = getattr(weights, part)
    scale.copy_(scale.roll(1, dims=1))
    wrong = fp8.run(layer, fp8.quantised(rows), weights).hidden_states.float()
    assert off(wrong, expected(layer, rows, (0, 1, 2, 3))) > 0.05
