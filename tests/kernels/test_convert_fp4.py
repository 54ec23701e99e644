"""`convert_fp4` writes the defined bytes of the wanted experts, and nothing of the others.

Shape letters: E local experts, N output features, K features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import block_format as formats
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from sglang_moelb.kernels.scale_layout import (
    ScaleLayout,
    stored_bytes,
    to_layout,
    to_row_major,
)
from tests.kernels import fp4_oracle as oracle

FP4 = (BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL, BlockFormat.NVFP4)
UNTOUCHED = 0xA5


@pytest.fixture
def convert_fp4(load_op: Callable) -> Callable:
    return load_op("convert_fp4")


def slot_for(weights: Tensor, block_format: BlockFormat) -> BlockScaled:
    """A slot whose bytes show what was written."""
    empty = formats.empty_block_scaled(tuple(weights.shape), block_format, "cpu")
    return BlockScaled(
        format=block_format,
        codes=torch.full_like(empty.codes, UNTOUCHED),
        scales=torch.full_like(empty.scales, UNTOUCHED),
        globals=formats.global_scales(weights) if block_format.has_global else None,
    )


def expected_for(weights: Tensor, slot: BlockScaled) -> tuple[Tensor, Tensor]:
    """Codes and scales of all experts, by the definitions that test_block_format checks."""
    return formats.quantise_blocks(weights, slot.globals, slot.format)


def random_weights(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Weights of very different magnitude, and one expert of random bit patterns."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(*shape[:2], 1, generator=generator) * 8
    weights = (torch.randn(shape, generator=generator) * spread.exp2()).bfloat16()
    if len(weights) > 1:
        bits = torch.randint(-(1 << 15), 1 << 15, shape[1:], generator=generator)
        weights[1] = bits.short().view(torch.bfloat16)
    return weights


def check(convert_fp4: Callable, weights: tuple[Tensor, ...], wanted: list[int], **options) -> None:
    for block_format in FP4:
        slots = tuple(slot_for(tensor, block_format) for tensor in weights)
        wanted_E = torch.tensor(wanted, dtype=torch.int32)
        assert convert_fp4(weights, wanted_E, slots, **options) is None
        for tensor, slot in zip(weights, slots, strict=True):
            codes, scales = expected_for(tensor, slot)
            for expert, is_wanted in enumerate(wanted):
                if is_wanted:
                    assert torch.equal(slot.codes[expert], codes[expert]), (block_format, expert)
                    assert torch.equal(slot.scales[expert], scales[expert]), (block_format, expert)
                else:
                    assert (slot.codes[expert] == UNTOUCHED).all()
                    assert (slot.scales[expert] == UNTOUCHED).all()


def test_the_worked_example_of_the_docstring(convert_fp4: Callable) -> None:
    weights = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    weights[0, 0, :4] = torch.tensor([1, -2.6, 0.3, -0.1])
    slot = slot_for(weights, BlockFormat.MXFP4)
    convert_fp4((weights,), torch.ones(1, dtype=torch.int32), (slot,))
    assert slot.codes.flatten().tolist() == [0xF4, 0x81, *[0] * 14]
    assert slot.scales.flatten().tolist() == [126]


@pytest.mark.parametrize("wanted", [[1, 1, 1], [0, 1, 0], [0, 0, 7], [0, 0, 0]])
def test_only_the_wanted_experts_of_both_tensors_are_written(
    convert_fp4: Callable, wanted: list[int]
) -> None:
    weights = (random_weights((3, 10, 96), 1), random_weights((3, 7, 32), 2))
    check(convert_fp4, weights, wanted)


@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 130, 64), (2, 5, 2048), (0, 4, 32), (2, 0, 32)])
def test_any_shape_of_whole_blocks(convert_fp4: Callable, shape: tuple[int, int, int]) -> None:
    check(convert_fp4, (random_weights(shape, sum(shape)),), [1] * shape[0])


@pytest.mark.parametrize("layout", list(ScaleLayout))
def test_scales_are_written_in_the_layout_of_the_slot(
    convert_fp4: Callable, layout: ScaleLayout
) -> None:
    weights = (random_weights((3, 130, 160), 7), random_weights((3, 6, 32), 8))
    wanted_E = torch.tensor([1, 0, 1], dtype=torch.int32)
    for block_format in FP4:
        slots = tuple(
            formats.empty_block_scaled(tuple(w.shape), block_format, "cpu", layout) for w in weights
        )
        convert_fp4(weights, wanted_E, slots)
        for tensor, slot in zip(weights, slots, strict=True):
            _, scales = expected_for(tensor, slot)
            scales[1] = 0
            assert torch.equal(slot.scales, to_layout(scales, layout))
            stored = stored_bytes(slot.scales, layout)
            assert stored.sum() == scales.sum()  # the padding is 0
            num_rows, num_columns = scales.shape[1:]
            assert torch.equal(to_row_major(slot.scales, layout, num_rows, num_columns), scales)


@pytest.mark.parametrize("num_programs", [1, 3, 1000])
def test_any_number_of_programs_writes_the_same(convert_fp4: Callable, num_programs: int) -> None:
    weights = (random_weights((2, 60, 160), 3), random_weights((2, 90, 128), 4))
    check(convert_fp4, weights, [1, 1], num_programs=num_programs)


def test_every_bfloat16_beside_a_six_gets_the_code_of_the_nearest_value(
    convert_fp4: Callable,
) -> None:
    bits = torch.arange(1 << 16).int()
    values = bits.short().view(torch.bfloat16)
    values = values[values.float().abs() <= 6]
    padded = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 15)
    blocks = torch.full((len(padded), 32), 6.0, dtype=torch.bfloat16)
    blocks[:, 1:16] = padded
    expected = formats.e2m1_codes(padded.float())
    for block_format in (BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL):
        slot = slot_for(blocks[None], block_format)
        convert_fp4((blocks[None],), torch.ones(1, dtype=torch.int32), (slot,))
        assert (slot.scales == 127).all()  # 2**0
        assert torch.equal(formats.unpack_pairs(slot.codes[0])[:, 1:16], expected)


def test_every_bfloat16_as_the_largest_of_its_block(convert_fp4: Callable) -> None:
    values = torch.arange(1 << 16).int().short().view(torch.bfloat16)
    every = torch.zeros(1, len(values), 32, dtype=torch.bfloat16)
    every[0, :, 9] = values
    positive = every[:, : 1 << 15].contiguous()
    for block_format, weights in ((BlockFormat.MXFP4, every), (BlockFormat.MXFP4_CEIL, positive)):
        slot = slot_for(weights, block_format)
        convert_fp4((weights,), torch.ones(1, dtype=torch.int32), (slot,))
        codes, scales = expected_for(weights, slot)
        assert torch.equal(slot.codes, codes)
        assert torch.equal(slot.scales, scales)


def test_the_given_global_scale_counts_not_the_tensors_own(convert_fp4: Callable) -> None:
    weights = random_weights((1, 6, 64), 5)
    for scale in (1e-3, 1.0, 3e4, 1e-42):
        empty = slot_for(weights, BlockFormat.NVFP4)
        slot = BlockScaled(
            format=empty.format,
            codes=empty.codes,
            scales=empty.scales,
            globals=torch.tensor([scale]),
        )
        convert_fp4((weights,), torch.ones(1, dtype=torch.int32), (slot,))
        codes = formats.unpack_pairs(slot.codes).flatten()
        for at, values in enumerate(weights.float().view(-1, 16).tolist()):
            expected, byte = oracle.block(values, name="nvfp4", global_scale=slot.globals.item())
            assert slot.scales.flatten()[at] == byte
            assert codes[at * 16 : at * 16 + 16].tolist() == expected


def test_what_is_not_finite_poisons_its_block_only(convert_fp4: Callable) -> None:
    weights = torch.ones(2, 2, 64, dtype=torch.bfloat16)
    weights[0, 0, 3], weights[1, 1, 40] = math.nan, -math.inf
    for block_format in FP4:
        slot = slot_for(weights, block_format)
        convert_fp4((weights,), torch.ones(2, dtype=torch.int32), (slot,))
        is_nan = formats.dequantise(slot).isnan().unflatten(-1, (-1, block_format.block_size))
        assert is_nan.all(-1).nonzero().tolist() == is_nan.any(-1).nonzero().tolist()
        nan_at = 40 // block_format.block_size
        assert is_nan.any(-1).nonzero().tolist() == [[0, 0, 0], [1, 1, nan_at]]


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    from sglang_moelb.kernels.convert_fp4 import convert_fp4

    weights = random_weights((2, 4, 64), 6)
    wanted_E = torch.ones(2, dtype=torch.int32)
    slot = slot_for(weights, BlockFormat.MXFP4)
    with pytest.raises(ValueError, match="one or two tensors"):
        convert_fp4((weights,) * 3, wanted_E, (slot,) * 3)
    with pytest.raises(ValueError, match="one FP4 format a call, got mxfp4, nvfp4"):
        convert_fp4((weights,) * 2, wanted_E, (slot, slot_for(weights, BlockFormat.NVFP4)))
    with pytest.raises(ValueError, match="got mxfp8"):
        convert_fp4((weights,), wanted_E, (slot_for(weights, BlockFormat.MXFP8),))
    swizzled = formats.empty_block_scaled(
        (2, 4, 64), BlockFormat.MXFP4, "cpu", ScaleLayout.SWIZZLED_128X4
    )
    with pytest.raises(ValueError, match="one layout"):
        convert_fp4((weights,) * 2, wanted_E, (slot, swizzled))
    with pytest.raises(ValueError, match="empty_block_scaled"):
        convert_fp4((weights,), wanted_E[:1], (slot,))
    with pytest.raises(ValueError, match=r"contiguous bfloat16"):
        convert_fp4((weights.float(),), wanted_E, (slot,))
