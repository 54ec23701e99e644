"""`quantise_rows` and its siblings give the rows of the format in both layouts of scales.

Shape letters: T rows, H features, N gate and up features, I features between the GEMMs, G groups,
e local experts, M rows that one has room for, W words of four groups.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels.testing import assert_close

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def quantise_rows(load_op: Callable) -> Callable:
    return load_op("quantise_rows")


@pytest.fixture
def silu_mul_quantise(load_op: Callable) -> Callable:
    return load_op("quantise_rows", "silu_mul_quantise")


@pytest.fixture
def quantise_masked_rows(load_op: Callable) -> Callable:
    return load_op("quantise_rows", "quantise_masked_rows")


def make_rows(num_rows: int, width: int, seed: int) -> Tensor:
    """Rows whose sizes differ from row to row and along the columns."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_rows, width, generator=generator)
    x_TH *= torch.logspace(-7, 3, max(num_rows, 1))[:num_rows, None]
    return (x_TH * torch.linspace(0.1, 2, width)).bfloat16()


def assert_quantised(x_TH: Tensor, q_TH: Tensor, scale_TG: Tensor) -> None:
    """Group by group, by the formula of the format, for finite rows."""
    num_rows, width = x_TH.shape
    assert q_TH.shape == x_TH.shape
    assert q_TH.is_contiguous()
    assert q_TH.dtype == torch.float8_e4m3fn
    assert scale_TG.shape == (num_rows, width // 128)
    groups = x_TH.float().reshape(num_rows, width // 128, 128)
    expected_TG = groups.abs().amax(2).clamp(min=1e-4) / 448
    assert_close("scales", expected_TG, scale_TG, tolerance=0.0)
    expected = (groups * (1 / expected_TG)[..., None]).to(torch.float8_e4m3fn).float()
    assert_close("values", expected.view(x_TH.shape), q_TH.float(), tolerance=0.0)


def dequantised(q_TH: Tensor, scale_TG: Tensor) -> Tensor:
    return q_TH.float() * scale_TG.repeat_interleave(128, 1)


def test_the_worked_example_of_the_docstring(quantise_rows: Callable) -> None:
    x_TH = torch.zeros(1, 256, dtype=torch.bfloat16)
    x_TH[0, 7], x_TH[0, 128], x_TH[0, 255] = 448, -4.5, 0.0201
    q_TH, scale_TG = quantise_rows(x_TH)
    assert scale_TG.tolist() == [[1.0, torch.tensor(4.5).div(448).item()]]
    assert (q_TH[0, 7].item(), q_TH[0, 128].item(), q_TH[0, 255].item()) == (448, -448, 2)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 128), (1, 128), (33, 384), (64, 256)])
def test_every_group_has_its_own_scale(
    quantise_rows: Callable, num_rows: int, width: int, column_major: bool
) -> None:
    x_TH = make_rows(num_rows, width, seed=1)
    assert_quantised(x_TH, *quantise_rows(x_TH, column_major=column_major))


def test_column_major_scales_start_each_column_at_16_bytes(quantise_rows: Callable) -> None:
    for num_rows, padded_rows in ((1, 4), (4, 4), (33, 36)):
        x_TH = make_rows(num_rows, 256, seed=2)
        assert quantise_rows(x_TH)[1].stride() == (2, 1)
        assert quantise_rows(x_TH, column_major=True)[1].stride() == (1, padded_rows)


def test_strided_rows_are_read_where_they_are(quantise_rows: Callable) -> None:
    wide = make_rows(40, 512, seed=3)
    assert_quantised(wide[:, 128:384], *quantise_rows(wide[:, 128:384]))
    columns = make_rows(256, 40, seed=3).t()
    assert_quantised(columns, *quantise_rows(columns))


@pytest.mark.parametrize("num_valid", [0, 1, 31, 32, 33, 70, 100])
def test_padding_rows_change_nothing_in_the_valid_ones(
    quantise_rows: Callable, num_valid: int
) -> None:
    x_TH = make_rows(70, 128, seed=4)
    num_rows_valid = torch.tensor([num_valid], dtype=torch.int32)
    q_TH, scale_TG = quantise_rows(x_TH, num_rows_valid=num_rows_valid)
    assert_quantised(x_TH[:num_valid], q_TH[:num_valid], scale_TG[:num_valid])


def test_nan_stays_in_its_place_and_harms_nothing_beside_it(quantise_rows: Callable) -> None:
    x_TH = make_rows(3, 256, seed=5)
    clean_TH = dequantised(*quantise_rows(x_TH))
    x_TH[1, 4] = NAN
    x_TH[2, 128:] = NAN
    back_TH = dequantised(*quantise_rows(x_TH))
    assert torch.equal(back_TH.isnan(), x_TH.isnan())
    assert_close("others", clean_TH[~x_TH.isnan()], back_TH[~x_TH.isnan()], tolerance=0.0)


def test_inf_stays_inf_in_its_place_and_takes_its_group_along(quantise_rows: Callable) -> None:
    x_TH = make_rows(3, 256, seed=6)
    clean_TH = dequantised(*quantise_rows(x_TH))
    x_TH[1, 4], x_TH[1, 5], x_TH[1, 6] = INF, -INF, 3e38
    back_TH = dequantised(*quantise_rows(x_TH))
    assert back_TH[1, 4] == INF
    assert back_TH[1, 5] == -INF
    assert int(back_TH.isnan().sum()) == 126
    assert bool(back_TH[1, :128].isfinite().logical_not().all())
    others = torch.ones(3, 256, dtype=torch.bool)
    others[1, :128] = False
    assert_close("others", clean_TH[others], back_TH[others], tolerance=0.0)


@pytest.mark.parametrize("column_major", [False, True])
def test_an_open_gate_quantises_the_product_in_bfloat16_exactly(
    silu_mul_quantise: Callable, quantise_rows: Callable, column_major: bool
) -> None:
    up_TI = make_rows(33, 256, seed=7)
    # sigmoid is 1 in float32 from 20 on, and torch rounds the product to bfloat16 once.
    gate_TI = torch.linspace(20, 200, 33 * 256).view(33, 256).bfloat16()
    gate_up_TN = torch.cat([gate_TI, up_TI], dim=1)
    q_TI, scale_TG = silu_mul_quantise(gate_up_TN, column_major=column_major)
    expected_q_TI, expected_TG = quantise_rows(gate_TI * up_TI, column_major=column_major)
    assert_close("values", expected_q_TI.float(), q_TI.float(), tolerance=0.0)
    assert_close("scales", expected_TG, scale_TG, tolerance=0.0)
    assert scale_TG.stride() == expected_TG.stride()


def test_silu_and_product_are_within_the_formats_tolerance(silu_mul_quantise: Callable) -> None:
    generator = torch.Generator().manual_seed(8)
    gate_up_TN = (torch.randn(65, 512, generator=generator) * 4).bfloat16()
    gate_TI, up_TI = gate_up_TN.double().chunk(2, dim=1)
    exact_TI = gate_TI * gate_TI.sigmoid() * up_TI
    q_TI, scale_TG = silu_mul_quantise(gate_up_TN)
    error_TI = (dequantised(q_TI, scale_TG) - exact_TI).abs()
    subnormal_TI = scale_TG.repeat_interleave(128, 1) * 2**-10
    # Half a step of bfloat16, then half a step of fp8.
    allowed_TI = exact_TI.abs() * 2**-8 + torch.maximum(exact_TI.abs() * 2**-4, subnormal_TI)
    assert bool((error_TI <= allowed_TI).all())
    assert int((q_TI.float() == 0).sum()) < q_TI.numel() // 10


def test_silu_keeps_nan_and_inf_to_their_groups(silu_mul_quantise: Callable) -> None:
    gate_up_TN = torch.ones(4, 512, dtype=torch.bfloat16)
    gate_up_TN[0, 3] = NAN
    gate_up_TN[1, 256 + 200] = NAN
    gate_up_TN[2, 5] = INF
    gate_up_TN[3, 6] = -INF  # silu(-Inf) is -Inf * 0 in float32
    back_TI = dequantised(*silu_mul_quantise(gate_up_TN))
    nan = {tuple(at) for at in back_TI.isnan().nonzero().tolist() if at[0] != 2}
    assert nan == {(0, 3), (1, 200), (3, 6)}
    assert back_TI[2, 5] == INF
    assert int(back_TI[2].isfinite().sum()) == 128


def test_padding_rows_change_nothing_in_the_valid_rows_of_silu(
    silu_mul_quantise: Callable,
) -> None:
    gate_up_TN = make_rows(40, 256, seed=9)
    whole = silu_mul_quantise(gate_up_TN)
    num_rows_valid = torch.tensor([7], dtype=torch.int32)
    part = silu_mul_quantise(gate_up_TN, num_rows_valid=num_rows_valid)
    for name, expected, out in zip(("values", "scales"), whole, part, strict=True):
        assert_close(name, expected[:7].float(), out[:7].float(), tolerance=0.0)


def test_rows_that_do_not_fit_the_groups_are_refused(
    quantise_rows: Callable, silu_mul_quantise: Callable
) -> None:
    with pytest.raises(ValueError, match=r"rows to quantise are torch\.float32"):
        quantise_rows(torch.zeros(2, 128))
    with pytest.raises(ValueError, match="have 130 columns, no multiple of 128"):
        quantise_rows(torch.zeros(2, 130, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="have 384 columns, no multiple of 256"):
        silu_mul_quantise(torch.zeros(2, 384, dtype=torch.bfloat16))


@pytest.mark.parametrize("width", [128, 384])
@pytest.mark.parametrize(
    "num_rows", [[0, 0, 0], [1, 0, 72], [72, 72, 72], [16, 17, 65], [64, 3, 0], []], ids=str
)
def test_the_first_rows_of_each_expert_are_quantised_as_alone(
    quantise_masked_rows: Callable, num_rows: list[int], width: int
) -> None:
    x_eMH = make_rows(72 * len(num_rows), width, seed=8).view(len(num_rows), 72, width)
    for expert, count in enumerate(num_rows):
        x_eMH[expert, count:] = NAN  # room holds anything
    q_eMH, scale_eMG = quantise_masked_rows(x_eMH, torch.tensor(num_rows, dtype=torch.int32))
    assert q_eMH.shape == x_eMH.shape
    assert q_eMH.is_contiguous()
    for expert, count in enumerate(num_rows):
        x_TH, q_TH, scale_TG = (one[expert, :count] for one in (x_eMH, q_eMH, scale_eMG))
        assert_quantised(x_TH, q_TH, scale_TG)


def test_scales_of_masked_rows_lie_as_deepgemm_takes_them(quantise_masked_rows: Callable) -> None:
    numbers = torch.tensor([9, 3, 0], dtype=torch.int32)[1:]  # at an address of any alignment
    x_eMH = make_rows(2 * 24, 384, seed=9).view(2, 24, 384)
    q_eMH, scale_eMG = quantise_masked_rows(x_eMH, numbers)
    assert scale_eMG.shape == (2, 24, 3)
    assert scale_eMG.stride() == (3 * 24, 1, 24)
    assert_quantised(x_eMH[0, :3], q_eMH[0, :3], scale_eMG[0, :3])


def test_masked_rows_that_do_not_belong_together_are_refused(
    quantise_masked_rows: Callable,
) -> None:
    x_eMH = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one int32 an expert"):
        quantise_masked_rows(x_eMH, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="one int32 an expert"):
        quantise_masked_rows(x_eMH, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="room for 6 rows"):
        quantise_masked_rows(x_eMH[:, :6], torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16"):
        quantise_masked_rows(x_eMH.float(), torch.zeros(2, dtype=torch.int32))


@pytest.fixture
def quantise_rows_ue8m0(load_op: Callable) -> Callable:
    return load_op("quantise_rows", "quantise_rows_ue8m0")


def powers_of_two(scale_TW: Tensor, num_groups: int) -> Tensor:
    """float64 2**(byte - 127) of each group, read from the words by arithmetic."""
    columns = [(scale_TW[:, g // 4] >> (8 * (g % 4))) & 255 for g in range(num_groups)]
    return torch.exp2(torch.stack(columns, dim=1).double() - 127)


def test_the_worked_example_with_powers_of_two(quantise_rows_ue8m0: Callable) -> None:
    x_TH = torch.zeros(2, 128, dtype=torch.bfloat16)
    x_TH[0, 3], x_TH[1, 3] = 448, 450
    q_TH, scale_TW = quantise_rows_ue8m0(x_TH)
    assert scale_TW.tolist() == [[127], [128]]
    assert q_TH[:, 3].tolist() == [448, 224]


@pytest.mark.parametrize(
    ("num_rows", "width"), [(0, 128), (1, 128), (33, 384), (64, 512), (5, 640), (70, 1024)]
)
def test_powers_of_two_are_the_least_that_hold_a_group(
    quantise_rows_ue8m0: Callable, num_rows: int, width: int
) -> None:
    num_groups = width // 128
    x_TH = make_rows(num_rows, width, seed=10)
    q_TH, scale_TW = quantise_rows_ue8m0(x_TH)
    assert q_TH.is_contiguous()
    assert scale_TW.is_contiguous()
    assert scale_TW.dtype == torch.int32
    assert scale_TW.shape == (num_rows, -(-num_groups // 4))
    groups = x_TH.double().reshape(num_rows, num_groups, 128)
    amax_TG = groups.abs().amax(2).clamp(min=1e-4)
    scale_TG = powers_of_two(scale_TW, num_groups)
    assert (amax_TG <= 448 * scale_TG).all()
    assert (amax_TG > 448 * scale_TG / 2).all()
    expected = (groups / scale_TG[..., None]).to(torch.float8_e4m3fn).float()
    assert_close("values", expected.view(x_TH.shape), q_TH.float(), tolerance=0.0)


def test_scale_bytes_of_no_group_are_zero(quantise_rows_ue8m0: Callable) -> None:
    """What a GEMM reads there must not depend on what the memory held."""
    for _ in range(3):
        assert not (quantise_rows_ue8m0(make_rows(9, 640, seed=11))[1][:, 1] >> 8).any()


def test_strided_rows_get_the_powers_of_two_of_contiguous_ones(
    quantise_rows_ue8m0: Callable,
) -> None:
    x_TH = make_rows(40, 512, seed=12)
    for part in (x_TH[:, 128:384], x_TH[::3]):
        for found, expected in zip(
            quantise_rows_ue8m0(part), quantise_rows_ue8m0(part.contiguous()), strict=True
        ):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_group_that_is_not_finite_is_nan_under_powers_of_two(
    quantise_rows_ue8m0: Callable, value: float
) -> None:
    x_TH = make_rows(40, 384, seed=13)
    clean, clean_TW = quantise_rows_ue8m0(x_TH)
    x_TH[7, 130] = value
    q_TH, scale_TW = quantise_rows_ue8m0(x_TH)
    assert q_TH[7, 128:256].float().isnan().all()
    assert (scale_TW[7, 0] >> 8) & 255 == 255
    q_TH[7, 128:256], scale_TW[7, 0] = clean[7, 128:256], clean_TW[7, 0]
    assert torch.equal(q_TH.view(torch.uint8), clean.view(torch.uint8))
    assert torch.equal(scale_TW, clean_TW)


def test_powers_of_two_refuse_what_does_not_fit_the_groups(quantise_rows_ue8m0: Callable) -> None:
    with pytest.raises(ValueError, match="no multiple of 128"):
        quantise_rows_ue8m0(torch.zeros(2, 130, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16"):
        quantise_rows_ue8m0(torch.zeros(2, 128))
