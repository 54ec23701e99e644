"""The formats equal their definitions: every bfloat16 value, every scale, and what is not finite.

Shape letters: E experts, K features.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import block_format as formats
from sglang_moelb.kernels.block_format import BlockFormat, BlockScaled
from tests.kernels import fp4_oracle as oracle

MX = (BlockFormat.MXFP4, BlockFormat.MXFP4_CEIL, BlockFormat.MXFP8)


def every_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)


def round_trip(x: Tensor, block_format: BlockFormat) -> Tensor:
    globals_ = formats.global_scales(x) if block_format.has_global else None
    codes, scales = formats.quantise_blocks(x, globals_, block_format)
    return formats.dequantise(
        BlockScaled(format=block_format, codes=codes, scales=scales, globals=globals_)
    )


def test_every_finite_bfloat16_gets_the_code_of_the_nearest_value() -> None:
    values = every_bfloat16().float()
    values = values[values.isfinite()]
    expected = [oracle.nearest(value, oracle.E2M1, 8) for value in values.tolist()]
    assert formats.e2m1_codes(values).tolist() == expected
    expected = [oracle.nearest(value, oracle.E4M3, 128) for value in values.tolist()]
    assert formats.e4m3_bits(values).tolist() == expected


def test_ties_go_to_the_even_code_and_zero_keeps_its_sign() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert formats.e2m1_codes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert formats.e2m1_codes(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert formats.e2m1_codes(torch.tensor([0.0, -0.0, -0.1, 1e9, -1e9])).tolist() == [
        0, 8, 8, 7, 15,
    ]  # fmt: skip


def test_codes_and_bytes_are_each_others_inverse() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert formats.e2m1_codes(formats.e2m1_values(codes)).tolist() == list(range(16))
    packed = formats.pack_pairs(codes)
    assert packed.tolist()[:2] == [0x10, 0x32]
    assert torch.equal(formats.unpack_pairs(packed), codes)
    values = formats.e4m3_values(torch.arange(127, dtype=torch.uint8))
    assert values.tolist() == oracle.E4M3
    scales = formats.e8m0_values(torch.arange(256).byte())
    assert scales[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(scales[255])


@pytest.mark.parametrize("block_format", MX)
def test_every_bfloat16_as_the_largest_of_a_block_gets_the_defined_scale(
    block_format: BlockFormat,
) -> None:
    values = every_bfloat16()
    x = torch.zeros(len(values), block_format.block_size, dtype=torch.bfloat16)
    x[:, 5] = values
    codes, scales = formats.quantise_blocks(x, None, block_format)
    finite = values.isfinite()
    expected = [oracle.mx_scale(abs(v), name=block_format.value) for v in values[finite].tolist()]
    assert scales[finite, 0].tolist() == expected
    assert (scales[~finite] == 255).all()
    assert (codes[~finite] == 0).all()


@pytest.mark.parametrize("block_format", list(BlockFormat))
def test_blocks_equal_the_definition_value_by_value(block_format: BlockFormat) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(6, 40, 1, generator=generator) * 6
    x = (torch.randn(6, 40, 32, generator=generator) * spread.exp2()).bfloat16()
    x[1, 3], x[2, 3, 7], x[2, 4, 1], x[3, 3] = 0, math.nan, -math.inf, -0.0
    x[4] = (
        torch.randint(-(1 << 15), 1 << 15, (40, 32), generator=generator)
        .short()
        .view(torch.bfloat16)
    )
    x[5] *= 2.0**-130
    globals_ = formats.global_scales(x) if block_format.has_global else None
    codes, scales = formats.quantise_blocks(x, globals_, block_format)
    one_by_one = codes if block_format is BlockFormat.MXFP8 else formats.unpack_pairs(codes)
    blocks = x.float().unflatten(-1, (-1, block_format.block_size))
    for expert in range(len(x)):
        scale = 1.0
        if globals_ is not None:
            scale = oracle.global_scale(blocks[expert].flatten(0, 1).tolist())
            assert scale == globals_[expert].item()
        for at, values in enumerate(blocks[expert].flatten(0, 1).tolist()):
            expected, byte = oracle.block(values, name=block_format.value, global_scale=scale)
            assert scales[expert].flatten()[at] == byte, (expert, at)
            size = block_format.block_size
            got = one_by_one[expert].flatten()[at * size : (at + 1) * size].tolist()
            assert got == expected, (expert, at)


def test_the_two_mx_scales_differ_only_where_the_largest_would_saturate() -> None:
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[0, 0], x[1, 0] = 6.0, 7.0
    assert round_trip(x, BlockFormat.MXFP4)[:, 0].tolist() == [6.0, 6.0]
    assert round_trip(x, BlockFormat.MXFP4_CEIL)[:, 0].tolist() == [6.0, 8.0]


@pytest.mark.parametrize("block_format", list(BlockFormat))
def test_what_is_not_finite_makes_its_block_nan_and_no_other(block_format: BlockFormat) -> None:
    size = block_format.block_size
    x = torch.ones(3, 4 * size, dtype=torch.bfloat16)
    x[0, 0], x[1, size], x[2, 2 * size + 3] = math.nan, math.inf, -math.inf
    back = round_trip(x, block_format).unflatten(-1, (4, size))
    assert back.isnan().all(-1).tolist() == back.isnan().any(-1).tolist()
    assert back.isnan().any(-1).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (back[~back.isnan()] - 1).abs().max() < 1e-6


def test_a_tensors_global_scales_are_equal_and_an_experts_are_its_own() -> None:
    x = torch.ones(3, 2, 16, dtype=torch.bfloat16)
    x[1] *= 4
    x[2] = 0
    assert formats.global_scales(x).tolist() == pytest.approx([1 / 2688, 4 / 2688, 1.0])
    assert formats.global_scales(x, per_tensor=True).tolist() == pytest.approx([4 / 2688] * 3)
    assert formats.global_scales(x[:0]).tolist() == []


@pytest.mark.parametrize(
    ("block_format", "limit"),
    [
        (BlockFormat.MXFP4, 0.12),
        (BlockFormat.MXFP4_CEIL, 0.13),
        (BlockFormat.NVFP4, 0.105),
        (BlockFormat.MXFP8, 0.03),
    ],
)
def test_emulated_weights_are_near_and_a_fixed_point(
    block_format: BlockFormat, limit: float
) -> None:
    weights = torch.randn(4, 8, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    emulated = formats.fake_quantise_fp4(weights, block_format)
    error = (emulated.float() - weights.float()).norm() / weights.float().norm()
    assert 0.01 < error < limit
    assert emulated.dtype == torch.bfloat16
    if not block_format.has_global:
        assert torch.equal(emulated, round_trip(weights, block_format).bfloat16())
        assert torch.equal(formats.fake_quantise_fp4(emulated, block_format), emulated)


def test_an_emulated_expert_does_not_depend_on_its_neighbours() -> None:
    weights = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    weights[1] *= 100
    for block_format in BlockFormat:
        alone = formats.fake_quantise_fp4(weights[2:], block_format)
        assert torch.equal(formats.fake_quantise_fp4(weights, block_format)[2:], alone)


@pytest.mark.parametrize("block_format", list(BlockFormat))
def test_a_width_of_broken_blocks_is_refused_by_name(block_format: BlockFormat) -> None:
    with pytest.raises(ValueError, match=f"24 features.*{block_format.value}"):
        formats.empty_block_scaled((2, 3, 24), block_format, "cpu")
