"""Which format and which GEMM a device gets, as a table."""

from __future__ import annotations

import pytest

from sglang_moelb.kernels.block_format import BlockFormat
from sglang_moelb.kernels.low_precision import (
    FP8_BLOCKS,
    Capability,
    Gemm,
    Proof,
    can_dot_scaled,
    formats_for,
    multiplies_fp4,
)

DEEP_FP8, DEEP_FP4, FLASHINFER = Gemm.DEEP_GEMM_FP8, Gemm.DEEP_GEMM_FP8_FP4, Gemm.FLASHINFER_FP4
TRITON, EMULATION = Gemm.TRITON, Gemm.EMULATION


@pytest.mark.parametrize(
    ("capability", "has_deep_gemm", "has_flashinfer", "expected"),
    [
        (None, False, False, [EMULATION]),
        ((8, 0), True, True, [EMULATION]),
        ((8, 9), True, True, [EMULATION]),
        ((9, 0), True, True, [DEEP_FP8, EMULATION]),
        ((9, 0), False, True, [EMULATION]),
        ((10, 0), True, True, [DEEP_FP4, FLASHINFER, TRITON, EMULATION]),
        ((10, 3), True, False, [DEEP_FP4, TRITON, EMULATION]),
        ((10, 0), False, True, [FLASHINFER, TRITON, EMULATION]),
        ((10, 0), False, False, [TRITON, EMULATION]),
        ((11, 0), True, True, [EMULATION]),
        ((12, 0), True, True, [FLASHINFER, TRITON, EMULATION]),
        ((12, 1), True, False, [TRITON, EMULATION]),
    ],
)
def test_a_device_gets_its_formats_in_this_order(
    capability: Capability | None, has_deep_gemm: bool, has_flashinfer: bool, expected: list[Gemm]
) -> None:
    found = formats_for(capability, has_deep_gemm=has_deep_gemm, has_flashinfer=has_flashinfer)
    assert [one.gemm for one in found] == expected
    assert all(one.reason for one in found)


def test_hopper_runs_fp8_and_blackwell_fp4() -> None:
    both = {"has_deep_gemm": True, "has_flashinfer": True}
    assert formats_for((9, 0), **both)[0].weights == FP8_BLOCKS
    assert formats_for((10, 0), **both)[0].weights == BlockFormat.MXFP4_CEIL.value
    assert formats_for((12, 0), **both)[0].weights == BlockFormat.NVFP4.value


def test_nothing_claims_to_have_run_on_blackwell() -> None:
    for capability in ((10, 0), (10, 3), (12, 0)):
        *real, emulation = formats_for(capability, has_deep_gemm=True, has_flashinfer=True)
        assert Proof.RUN not in {one.proof for one in real}
        assert emulation.gemm is EMULATION


def test_a_device_without_a_gemm_is_named_in_the_reason() -> None:
    found = formats_for((8, 9), has_deep_gemm=True, has_flashinfer=True)
    assert "sm_89" in found[-1].reason
    found = formats_for((9, 0), has_deep_gemm=False, has_flashinfer=False)
    assert "install deep_gemm" in found[-1].reason


@pytest.mark.parametrize(
    ("capability", "rows", "weights", "scaled", "native"),
    [
        (None, BlockFormat.MXFP4, BlockFormat.MXFP4, False, False),
        ((9, 0), BlockFormat.MXFP4, BlockFormat.MXFP4, True, False),
        ((9, 0), None, BlockFormat.MXFP4_CEIL, True, False),
        ((9, 0), BlockFormat.NVFP4, BlockFormat.NVFP4, False, False),
        ((10, 0), BlockFormat.MXFP4, BlockFormat.MXFP4, True, True),
        ((10, 0), BlockFormat.MXFP8, BlockFormat.MXFP4, True, True),
        ((10, 3), None, BlockFormat.MXFP4, True, False),
        ((10, 0), BlockFormat.NVFP4, BlockFormat.NVFP4, True, True),
        ((10, 0), None, BlockFormat.NVFP4, False, False),
        ((12, 0), BlockFormat.MXFP8, BlockFormat.MXFP4, True, False),
        ((12, 0), BlockFormat.MXFP4, BlockFormat.MXFP4, True, True),
        ((12, 1), BlockFormat.NVFP4, BlockFormat.NVFP4, True, True),
        ((8, 0), BlockFormat.MXFP4, BlockFormat.MXFP4, False, False),
    ],
)
def test_dot_scaled_is_taken_where_triton_compiles_it(
    capability: Capability | None,
    rows: BlockFormat | None,
    weights: BlockFormat,
    scaled: bool,
    native: bool,
) -> None:
    assert can_dot_scaled(capability, rows, weights) is scaled
    assert multiplies_fp4(capability, rows, weights) is native
