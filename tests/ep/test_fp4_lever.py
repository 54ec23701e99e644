"""Laws of FP4 by emulation under the lever: the experts compute on the values that FP4 has.

Layers and rows are those of `test_downgrade_lever`; the reference here is written from the
definitions of the formats, expert by expert.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.formats import EMULATED, format_named
from sglang_moelb.ep.low.fp4 import EmulatedFp4
from sglang_moelb.ep.low.lanes import HostLanes
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.kernels.block_format import (
    BlockFormat,
    BlockScaled,
    dequantise,
    global_scales,
    quantise_blocks,
)

from .test_downgrade_lever import CPU, E_LOCAL, Dispatched, Layer, plan, received

NAMES = sorted(EMULATED)
ERROR = {"nvfp4-emulated": (0.08, 0.25), "mxfp4-emulated": (0.05, 0.25)}


@pytest.fixture(autouse=True)
def combine_input() -> None:
    """The module of SGLang's that holds the class need not be importable here."""
    pytest.importorskip("sglang.srt.layers.moe.token_dispatcher.deepep")


def made(layers: list[Layer], name: str, **asked: Any) -> DowngradeLever:
    staging = Staging(
        layers,
        **{"num_slots": 2, "resident": (), **asked},
        lanes=HostLanes(),
        low_format=format_named(name, layers),
    )
    return DowngradeLever(layers, 0, staging, HostFlags(E_LOCAL, CPU))


def values(x: torch.Tensor, block_format: BlockFormat) -> torch.Tensor:
    """What `x` is in a block format; the first axis has globals of its own."""
    globals_ = global_scales(x) if block_format.has_global else None
    codes, scales = quantise_blocks(x, globals_, block_format)
    return dequantise(
        BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_)
    )


def by_definition(
    layer: Layer, rows: Dispatched, name: str, experts: tuple[int, ...] = tuple(range(E_LOCAL))
) -> torch.Tensor:
    """The layer's `experts` on values of the format, a row and an expert at a time."""
    weights, of_rows = EMULATED[name]
    w13, w2 = values(layer.w13_weight.data, weights), values(layer.w2_weight.data, weights)
    out = torch.zeros(rows.hidden_states.shape)
    for row, ids in enumerate(rows.topk_ids.tolist()):
        for column, expert in enumerate(ids):
            if expert not in experts:
                continue
            x = values(rows.hidden_states[row : row + 1], of_rows)
            gate, up = (x @ w13[expert].T).bfloat16().float().chunk(2, dim=1)
            act = values((F.silu(gate) * up).bfloat16(), of_rows)
            down = (act @ w2[expert].T).bfloat16().float()
            out[row] += down[0] * rows.topk_weights[row, column]
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resident", [(), (0,)])
def test_a_lowered_rank_computes_on_values_of_the_format(
    name: str, resident: tuple[int, ...]
) -> None:
    layer, rows = Layer(1), received(2)
    downgrade = made([layer], name, resident=resident)
    downgrade.prepare(0, plan(1, 1, 1, 1))
    out = downgrade.run(layer, rows)
    expected = by_definition(layer, rows, name)
    # Sums of another order may round a bfloat16, and with it a code of the activation, apart.
    assert (out.hidden_states - expected).norm() / expected.norm() < 0.01
    exact = layer.apply(layer, rows).hidden_states.float()
    low, high = ERROR[name]
    assert low < (out.hidden_states - exact).norm() / exact.norm() < high
    assert out.hidden_states.dtype == rows.hidden_states.dtype
    assert torch.equal(out.topk_ids, rows.topk_ids)
    assert torch.equal(out.topk_weights, rows.topk_weights)


def test_the_formats_are_not_each_other() -> None:
    layer, rows = Layer(1), received(2)
    outputs = []
    for name in NAMES:
        downgrade = made([layer], name)
        downgrade.prepare(0, plan(1, 1, 1, 1))
        outputs.append(downgrade.run(layer, rows).hidden_states)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_experts_run_each_in_its_own_precision_and_add_up(name: str) -> None:
    layer, rows = Layer(1), received(2)
    downgrade = made([layer], name)
    downgrade.prepare(0, plan(1, 0, 1, 0))
    out = downgrade.run(layer, rows).hidden_states
    is_low = torch.isin(rows.topk_ids, torch.tensor([0, 2]))
    high = layer.apply(layer, rows._replace(topk_ids=rows.topk_ids.where(~is_low, -1)))
    expected = high.hidden_states.float() + by_definition(layer, rows, name, (0, 2))
    assert (out - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_other_magnitudes_share_slots_without_taking_each_others_scales(
    name: str,
) -> None:
    layers = [Layer(seed) for seed in range(3)]
    for power, layer in enumerate(layers):
        layer.w13_weight.data *= 32.0**power
        layer.w2_weight.data *= 8.0**-power
    downgrade = made(layers, name, num_slots=1)
    for number in (0, 2, 1, 0):
        rows = received(number)
        downgrade.prepare(number, plan(1, 1, 1, 1))
        out = downgrade.run(layers[number], rows).hidden_states
        expected = by_definition(layers[number], rows, name)
        assert (out - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_result_does_not_depend_on_its_batch(name: str) -> None:
    layer, rows = Layer(1), received(2)
    low_format = format_named(name, [layer])
    weights = low_format.allocate(layer)
    low_format.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    whole = low_format.run(layer, low_format.quantised(rows), weights).hidden_states
    few = rows._replace(
        hidden_states=rows.hidden_states[7:12],
        topk_ids=rows.topk_ids[7:12],
        topk_weights=rows.topk_weights[7:12],
    )
    alone = low_format.run(layer, low_format.quantised(few), weights).hidden_states
    assert (whole[7:12].float() - alone.float()).norm() / alone.float().norm() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_an_expert_here_are_zero_and_no_rows_are_no_error(name: str) -> None:
    layer, rows = Layer(1), received(2)
    low_format = format_named(name, [layer])
    weights = low_format.allocate(layer)
    low_format.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    rows.topk_ids[::2] = -1
    out = low_format.run(layer, low_format.quantised(rows), weights).hidden_states
    assert not out[::2].any()
    assert out[1::2].any(dim=1).all()
    none = rows._replace(
        topk_ids=torch.full_like(rows.topk_ids, -1), num_recv_tokens_per_expert=[0] * E_LOCAL
    )
    assert not low_format.run(layer, low_format.quantised(none), weights).hidden_states.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name: str) -> None:
    layer, rows = Layer(1), received(2)
    low_format = format_named(name, [layer])
    weights = low_format.allocate(layer)
    low_format.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    clean = low_format.run(layer, low_format.quantised(rows), weights).hidden_states
    rows.hidden_states[5, 3] = torch.nan
    out = low_format.run(layer, low_format.quantised(rows), weights).hidden_states
    assert out[5].isnan().all()
    assert torch.equal(out[:5], clean[:5])
    assert torch.equal(out[6:], clean[6:])


def test_memory_is_that_of_codes_scales_and_globals() -> None:
    layer = Layer(1)
    num_weights = layer.w13_weight.numel() + layer.w2_weight.numel()
    for name, of_scales in (("nvfp4-emulated", 16), ("mxfp4-emulated", 32)):
        low_format = format_named(name, [layer])
        assert isinstance(low_format, EmulatedFp4)
        num_globals = 2 * E_LOCAL if name == "nvfp4-emulated" else 0
        expected = num_weights // 2 + num_weights // of_scales + 4 * num_globals
        assert low_format.allocate(layer).num_bytes == expected
