"""`convert_fp8` gives the blocks of the format, for the experts that are wanted and no others.

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels.testing import assert_close

UNTOUCHED = 7.0
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def convert_fp8(load_op: Callable) -> Callable:
    return load_op("convert_fp8")


def make_weights(num_experts: int, shapes: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    """Weights whose sizes differ from expert to expert and along the columns."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for rows, columns in shapes:
        weight_ENK = torch.randn(num_experts, rows, columns, generator=generator)
        weight_ENK *= torch.logspace(-6, 3, num_experts)[:, None, None]
        weights.append((weight_ENK * torch.linspace(0.1, 2, columns)).bfloat16())
    return weights


def make_slots(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and scales that hold UNTOUCHED."""
    out = [torch.full(weight.shape, UNTOUCHED).to(torch.float8_e4m3fn) for weight in weights]
    scales = [
        torch.full((len(weight), *(-(-size // 128) for size in weight.shape[1:])), UNTOUCHED)
        for weight in weights
    ]
    return out, scales


def converted(
    convert_fp8: Callable, weights: Sequence[Tensor], wanted: Sequence[int], **options: int
) -> tuple[list[Tensor], list[Tensor]]:
    out, scales = make_slots(weights)
    wanted_E = torch.tensor(wanted, dtype=torch.int32)
    convert_fp8(weights, out, scales, wanted_E=wanted_E, **options)
    return out, scales


def assert_converted(
    weights: Sequence[Tensor], wanted: Sequence[int], out: list[Tensor], scales: list[Tensor]
) -> None:
    """Block by block, by the formula of the format, for finite weights."""
    for weight_ENK, out_ENK, scale_ENK in zip(weights, out, scales, strict=True):
        for e, i, j in product(*(range(size) for size in scale_ENK.shape)):
            at = (e, slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            block, values, scale = weight_ENK[at].float(), out_ENK[at].float(), scale_ENK[e, i, j]
            if not wanted[e]:
                assert bool((values == UNTOUCHED).all())
                assert scale == UNTOUCHED
                continue
            assert scale == max(block.abs().max(), torch.tensor(1e-4)) / 448
            expected = (block * (1 / scale)).to(torch.float8_e4m3fn).float()
            assert_close(f"block {e, i, j}", expected, values, tolerance=0.0)


def test_a_block_of_two_numbers_by_hand(convert_fp8: Callable) -> None:
    weight_ENK = torch.zeros(1, 128, 128, dtype=torch.bfloat16)
    weight_ENK[0, 5, 6], weight_ENK[0, 127, 127] = -896, 5
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, [weight_ENK], [1])
    assert scale_ENK.tolist() == [[[2.0]]]
    assert out_ENK[0, 5, 6].item() == -448
    assert out_ENK[0, 127, 127].item() == 2.5
    assert int((out_ENK.float() != 0).sum()) == 2


@pytest.mark.parametrize("wanted", [[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, -1]])
def test_wanted_experts_are_converted_in_all_weights_and_others_left_alone(
    convert_fp8: Callable, wanted: list[int]
) -> None:
    weights = make_weights(3, [(256, 128), (128, 384)], seed=1)
    assert_converted(weights, wanted, *converted(convert_fp8, weights, wanted))


@pytest.mark.parametrize("num_programs", [1, 2, 7, 1000])
def test_the_number_of_programs_changes_nothing(convert_fp8: Callable, num_programs: int) -> None:
    weights = make_weights(2, [(128, 256), (128, 128)], seed=2)
    out, scales = converted(convert_fp8, weights, [1, 1], num_programs=num_programs)
    assert_converted(weights, [1, 1], out, scales)


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (130, 8), (0, 128), (200, 300)])
def test_blocks_at_the_edge_are_filled_up_with_zeros(
    convert_fp8: Callable, shape: tuple[int, int]
) -> None:
    weights = make_weights(2, [(128, 128), shape, (129, 64)], seed=3)
    assert_converted(weights, [0, 1], *converted(convert_fp8, weights, [0, 1]))


def test_what_was_converted_is_within_half_a_step_of_the_weight(convert_fp8: Callable) -> None:
    weights = make_weights(2, [(128, 256)], seed=4)
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, weights, [1, 1])
    scale_ENK = scale_ENK.repeat_interleave(128, 1).repeat_interleave(128, 2)
    error_ENK = (out_ENK.float() * scale_ENK - weights[0].float()).abs()
    # 3 bits of mantissa, and subnormals in steps of 2**-9.
    allowed_ENK = torch.maximum(weights[0].float().abs() / 16, scale_ENK * 2**-10)
    assert bool((error_ENK <= allowed_ENK * 1.0001).all())


def test_blocks_of_zeros_and_of_tiny_numbers_have_a_scale_that_is_not_zero(
    convert_fp8: Callable,
) -> None:
    weight_ENK = torch.zeros(2, 128, 128, dtype=torch.bfloat16)
    weight_ENK[1] = -(2.0**-30)
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, [weight_ENK], [1, 1])
    assert scale_ENK.flatten().tolist() == [torch.tensor(1e-4).div(448).item()] * 2
    assert not out_ENK[0].float().any()
    assert bool((out_ENK[1].float() < 0).all())


def test_nan_stays_in_its_place_and_leaves_its_block_as_it_is(convert_fp8: Callable) -> None:
    weights = make_weights(1, [(128, 256)], seed=5)
    (clean_ENK,), (clean_scale_ENK,) = converted(convert_fp8, weights, [1])
    smallest = weights[0][0, :, :128].abs().argmin()
    at = (0, int(smallest) // 128, int(smallest) % 128)
    weights[0][at] = NAN
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, weights, [1])
    assert out_ENK[at].float().isnan()
    out_ENK[at] = clean_ENK[at]
    assert_close("values", clean_ENK.float(), out_ENK.float(), tolerance=0.0)
    assert torch.equal(scale_ENK, clean_scale_ENK)


def test_inf_stays_inf_in_its_place_and_its_block_is_nan_beside_it(convert_fp8: Callable) -> None:
    weights = make_weights(1, [(128, 256)], seed=6)
    weights[0][0, 3, 4], weights[0][0, 9, 9], weights[0][0, 0, 0] = INF, -INF, 3e38
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, weights, [1])
    assert scale_ENK[0, 0, 0] == INF
    back = out_ENK[0, :, :128].float() * scale_ENK[0, 0, 0]
    assert back[3, 4] == INF
    assert back[9, 9] == -INF
    assert int(back.isnan().sum()) == 128 * 128 - 2
    assert bool(out_ENK[0, :, 128:].float().isfinite().all())
    assert scale_ENK[0, 0, 1].isfinite()


def test_the_largest_bfloat16_is_converted_without_overflow(convert_fp8: Callable) -> None:
    largest = torch.finfo(torch.bfloat16).max
    weight_ENK = torch.full((1, 128, 128), largest, dtype=torch.bfloat16)
    (out_ENK,), (scale_ENK,) = converted(convert_fp8, [weight_ENK], [1])
    assert bool((out_ENK.float() == 448).all())
    assert scale_ENK.item() == torch.tensor(largest).div(448).item()


def test_tensors_that_do_not_belong_together_are_refused(convert_fp8: Callable) -> None:
    weights = make_weights(2, [(128, 128)], seed=7)
    out, scales = make_slots(weights)
    wanted_E = torch.ones(2, dtype=torch.int32)
    for arguments, message in (
        (([], [], []), "give one output and one scale for each of at least one weight"),
        ((weights, out, []), "1 weights, 1 outputs and 0 scales"),
        (([weights[0].float()], out, scales), r"scale 0 are torch\.float32 \(2, 128, 128\)"),
        ((weights, [out[0][:1]], scales), r"float8_e4m3fn \(1, 128, 128\)"),
        ((weights, out, [scales[0].bfloat16()]), r"torch\.bfloat16 \(2, 1, 1\)"),
        ((weights, out, [scales[0][:, :, :0]]), r"torch\.float32 \(2, 1, 0\)"),
        (([weights[0].transpose(1, 2)], out, scales), r"with strides \(16384, 1, 128\)"),
        (([weights[0][0]], [out[0][0]], [scales[0][0]]), r"must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_fp8(*arguments, wanted_E=wanted_E)
    with pytest.raises(ValueError, match="with E = 3 as in wanted_E"):
        convert_fp8(weights, out, scales, wanted_E=torch.ones(3, dtype=torch.int32))
