"""Which low precision a device's tensor cores have, and which GEMM reaches it. Pure; host only.

What is known of each row is in `Proof`: nothing here was run on Blackwell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sglang_moelb.kernels.block_format import BlockFormat
from sglang_moelb.kernels.scale_layout import ScaleLayout

Capability = tuple[int, int]

HOPPER = 9
DATA_CENTRE_BLACKWELL = 10  # sm_100, sm_103: tcgen05
CONSUMER_BLACKWELL = 12  # sm_120, sm_121: mma.sync
FP8_BLOCKS = "fp8_block128"


class Gemm(Enum):
    """Who multiplies. The first three are other libraries', reached through SGLang or directly."""

    DEEP_GEMM_FP8 = "deep_gemm.m_grouped_fp8_gemm_nt_contiguous"
    DEEP_GEMM_FP8_FP4 = "deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous"
    FLASHINFER_FP4 = "flashinfer.grouped_mm.grouped_mm_fp4"
    TRITON = "sglang_moelb.kernels.grouped_fp4"
    EMULATION = "fake_quantise_fp4, then the bfloat16 GEMM"


class Proof(Enum):
    """How far a choice has been checked."""

    RUN = "run on this hardware"
    COMPILED = "compiled to this hardware's instructions, numerics run by emulation elsewhere"
    READ = "the library's source accepts it; numerics run by emulation elsewhere"


@dataclass(frozen=True, kw_only=True, slots=True)
class LowPrecision:
    """One way to run experts below bfloat16, with the reason for its place in the order.

    `rows` and `weights` are values of `BlockFormat`, FP8_BLOCKS (e4m3, float32 scales: a row's 128
    features, 128x128 of weights) or "bfloat16". `layout` is that of block scales, or None. `word`
    is what `downgrade.format` calls it, or "" where the lever has no path to this GEMM.
    """

    rows: str
    weights: str
    gemm: Gemm
    layout: ScaleLayout | None
    proof: Proof
    reason: str
    word: str = ""


FP8_HOPPER = LowPrecision(
    rows=FP8_BLOCKS,
    weights=FP8_BLOCKS,
    gemm=Gemm.DEEP_GEMM_FP8,
    layout=None,
    proof=Proof.RUN,
    reason="Hopper's tensor cores multiply e4m3 at twice bfloat16's rate and have no FP4",
    word="fp8",
)
FP8_FP4_BLACKWELL = LowPrecision(
    rows="fp8 e4m3, power-of-two scales of 128 features",
    weights=BlockFormat.MXFP4_CEIL.value,
    gemm=Gemm.DEEP_GEMM_FP8_FP4,
    layout=ScaleLayout.MN_MAJOR,
    proof=Proof.READ,
    reason="SGLang's DeepEP runner takes it (is_fp4_experts): no other GEMM has to be wired",
    word="mxfp4",
)
NVFP4_BLACKWELL = LowPrecision(
    rows=BlockFormat.NVFP4.value,
    weights=BlockFormat.NVFP4.value,
    gemm=Gemm.FLASHINFER_FP4,
    layout=ScaleLayout.SWIZZLED_128X4,
    proof=Proof.READ,
    reason="four bits on both sides, ReaLB's format; `globals` have to multiply its output's rows",
)
TRITON_MXFP4 = LowPrecision(
    rows=BlockFormat.MXFP4_CEIL.value,
    weights=BlockFormat.MXFP4_CEIL.value,
    gemm=Gemm.TRITON,
    layout=ScaleLayout.ROW_MAJOR,
    proof=Proof.COMPILED,
    reason="needs no library; tl.dot_scaled becomes a block-scaled FP4 instruction",
)


def formats_for(
    capability: Capability | None, *, has_deep_gemm: bool, has_flashinfer: bool
) -> tuple[LowPrecision, ...]:
    """What a device can run experts in, the best first; the last is always emulation.

    Args:
        capability: of `torch.cuda.get_device_capability`, or None for a CPU.
        has_deep_gemm, has_flashinfer: whether the package can be imported.
    """
    major = capability[0] if capability else 0
    found = []
    if major == HOPPER and has_deep_gemm:
        found.append(FP8_HOPPER)
    if major == DATA_CENTRE_BLACKWELL and has_deep_gemm:
        found.append(FP8_FP4_BLACKWELL)
    if major in (DATA_CENTRE_BLACKWELL, CONSUMER_BLACKWELL):
        found += [NVFP4_BLACKWELL] if has_flashinfer else []
        found.append(TRITON_MXFP4)
    return (*found, _emulation(capability, has_deep_gemm=has_deep_gemm))


def _emulation(capability: Capability | None, *, has_deep_gemm: bool) -> LowPrecision:
    major = capability[0] if capability else 0
    if capability is None:
        reason = "a CPU has no low-precision GEMM: numerics only"
    elif major == HOPPER and not has_deep_gemm:
        reason = "Hopper without DeepGEMM has no grouped FP8 GEMM: numerics only; install deep_gemm"
    elif major in (HOPPER, DATA_CENTRE_BLACKWELL, CONSUMER_BLACKWELL):
        reason = "numerics of a format that this device lacks; no faster than bfloat16"
    else:
        name = f"sm_{capability[0]}{capability[1]}"
        reason = f"{name} has no grouped GEMM below bfloat16 that we know"
    return LowPrecision(
        rows="bfloat16",
        weights="bfloat16",
        gemm=Gemm.EMULATION,
        layout=None,
        proof=Proof.RUN,
        reason=reason,
    )


def can_dot_scaled(
    capability: Capability | None, rows: BlockFormat | None, weights: BlockFormat
) -> bool:
    """Whether Triton 3.6 and 3.7 compile `tl.dot_scaled` for these formats (rows None: bfloat16).

    They do for e8m0 scales on Hopper, where products become bfloat16, and on Blackwell. For NVFP4's
    e4m3 scales they do only where an instruction takes them: both sides NVFP4, on Blackwell; else
    Triton's decomposition fails an assertion.
    """
    major = capability[0] if capability else 0
    if weights is BlockFormat.NVFP4:
        return rows is BlockFormat.NVFP4 and major in (DATA_CENTRE_BLACKWELL, CONSUMER_BLACKWELL)
    return major in (HOPPER, DATA_CENTRE_BLACKWELL, CONSUMER_BLACKWELL)


def multiplies_fp4(
    capability: Capability | None, rows: BlockFormat | None, weights: BlockFormat
) -> bool:
    """Whether `tl.dot_scaled` becomes an instruction on FP4 operands, not products of bfloat16."""
    major = capability[0] if capability else 0
    if major not in (DATA_CENTRE_BLACKWELL, CONSUMER_BLACKWELL) or rows is None:
        return False
    is_fp8 = rows is BlockFormat.MXFP8
    return can_dot_scaled(capability, rows, weights) and not (
        is_fp8 and major == CONSUMER_BLACKWELL
    )
