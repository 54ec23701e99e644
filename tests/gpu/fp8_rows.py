"""Checks of `quantise_rows` and `silu_mul_quantise` on a CUDA device; run by check_fp8.py.

Shape letters: T rows, H features, N gate and up features, I features between the two GEMMs,
G groups, W words of four groups.
"""

from __future__ import annotations

import torch
from fp8_inputs import assert_same_fp8, make_rows, no_host_sync

from sglang_moelb.kernels.quantise_rows import (
    quantise_rows,
    quantise_rows_ue8m0,
    ref,
    silu_mul_quantise,
)
from sglang_moelb.kernels.testing import assert_close

# silu differs by an ulp of float32 between exp's, seldom enough to round to another bfloat16.
MAX_SHARE_OF_OTHER_CODES = 1e-3
SMALL_SIZES = ((0, 128), (1, 128), (33, 384), (129, 2048))
SIZES = (*SMALL_SIZES, (16384, 2048), (5001, 768))


def check(*, small: bool) -> None:
    """All sizes."""
    for num_rows, width in SMALL_SIZES if small else SIZES:
        check_rows(num_rows, width)
        check_silu(num_rows, 2 * width)
        check_powers_of_two(num_rows, width)
    print("quantise_rows, quantise_rows_ue8m0, silu_mul_quantise: equal")
    if not small:
        check_many_rows()
        print("quantise_rows, silu_mul_quantise: equal beyond 2**31 elements")


def check_rows(num_rows: int, width: int) -> None:
    """`quantise_rows` in both layouts, and some rows of it only."""
    x_TH = make_rows(num_rows, width, special=True)
    for column_major in (False, True):
        expected = ref.quantise_rows(x_TH, column_major=column_major)
        for num_valid in (None, 0, num_rows // 2, num_rows + 9):
            num_rows_valid = None
            if num_valid is not None:
                num_rows_valid = torch.tensor([num_valid], dtype=torch.int32, device="cuda")
            with no_host_sync():
                q_TH, scale_TG = quantise_rows(
                    x_TH, num_rows_valid=num_rows_valid, column_major=column_major
                )
            name = f"quantise_rows T={num_rows} H={width} {column_major=} {num_valid=}"
            assert_same_fp8(name, expected[0][:num_valid], q_TH[:num_valid])
            assert_close(name, expected[1][:num_valid], scale_TG[:num_valid], tolerance=0.0)
            assert scale_TG.stride() == expected[1].stride(), name


def check_powers_of_two(num_rows: int, width: int) -> None:
    """`quantise_rows_ue8m0`; DeepGEMM's on SM100, but any device computes them."""
    x_TH = make_rows(num_rows, width, special=True)
    expected = ref.quantise_rows_ue8m0(x_TH)
    with no_host_sync():
        q_TH, scale_TW = quantise_rows_ue8m0(x_TH)
    name = f"quantise_rows_ue8m0 T={num_rows} H={width}"
    assert_same_fp8(name, expected[0], q_TH)
    assert_close(name, expected[1], scale_TW, tolerance=0.0)


def check_silu(num_rows: int, width: int) -> None:
    """`silu_mul_quantise`: exact where the gate is open, else but for the ulps of exp."""
    up_TI = make_rows(num_rows, width // 2, special=True)
    gate_TI = 2.0 ** torch.randint(5, 9, up_TI.shape, device="cuda").bfloat16()
    expected = ref.quantise_rows(gate_TI * up_TI)
    with no_host_sync():
        out = silu_mul_quantise(torch.cat([gate_TI, up_TI], dim=1))
    name = f"silu_mul_quantise T={num_rows} N={width}"
    assert_same_fp8(f"{name}, open gate", expected[0], out[0])
    assert_close(f"{name}, open gate", expected[1], out[1], tolerance=0.0)

    x_TN = (torch.randn(num_rows, width, device="cuda") * 4).bfloat16()
    for place, x in (("device", x_TN), ("host", x_TN[:2000].cpu())):
        q_TI, scale_TG = ref.silu_mul_quantise(x)
        out_q_TI, out_TG = (part[: len(x)].to(x.device) for part in silu_mul_quantise(x_TN))
        assert bool(((out_TG / scale_TG - 1).abs() < 2**-7).all()), f"{name}: scales"
        share = (q_TI.view(torch.uint8) != out_q_TI.view(torch.uint8)).float().mean().item()
        if num_rows:
            print(f"  {name}: {share:.1e} of codes differ from the reference on the {place}")
            assert share < MAX_SHARE_OF_OTHER_CODES
        steps = (q_TI.view(torch.uint8).int() - out_q_TI.view(torch.uint8).int()).abs()
        steps = steps.where((q_TI.float() != 0) | (out_q_TI.float() != 0), 0)
        assert num_rows == 0 or int(steps.max()) <= 1, f"{name}: codes differ by {steps.max()}"


def check_many_rows() -> None:
    """More than 2**31 elements in both ops: the last rows."""
    for op, function, reference, num_rows, width in (
        ("quantise_rows", quantise_rows, ref.quantise_rows, 1_100_003, 2048),
        ("silu_mul_quantise", silu_mul_quantise, ref.silu_mul_quantise, 1_500_003, 1536),
    ):
        x = torch.empty(num_rows, width, dtype=torch.bfloat16, device="cuda")
        assert x.numel() > 1 << 31
        x[:99].normal_()
        x[-99:].normal_()
        x[-99:, : width // 2] = 32  # an open gate, so that silu is exact
        for column_major in (False, True):
            q, scale = function(x, column_major=column_major)
            expected_q, expected_scale = reference(x[-99:])
            assert_same_fp8(f"{op}, last rows", expected_q, q[-99:])
            assert_close(f"{op}, last scales", expected_scale, scale[-99:], tolerance=0.0)
