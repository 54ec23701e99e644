"""Checks against DeepGEMM on a CUDA device: its quantisers, and both grouped GEMMs of the experts.

Shape letters: T rows, H features, N output features, K input features, E experts,
I features between the two GEMMs.
"""

from __future__ import annotations

import deep_gemm
import torch
from deep_gemm.utils.math import per_block_cast_to_fp8, per_token_cast_to_fp8
from fp8_inputs import NAN, assert_same_fp8, make_slots
from torch import Tensor
from torch.nn.functional import silu

from sglang_moelb.kernels.convert_fp8 import convert_fp8
from sglang_moelb.kernels.quantise_rows import quantise_rows, silu_mul_quantise
from sglang_moelb.kernels.testing import assert_close

HIDDEN, INTERMEDIATE = 2048, 768
ROWS_OF_EXPERTS = (0, 1, 127, 128, 129, 0, 255, 256, 257, 1000, 64, 0)
# Of 1 - 2xy / (xx + yy), DeepGEMM's own measure: two GEMMs on fp8 against float32 on bf16, and
# against float32 on the same fp8 values, where only sums and the output's bfloat16 differ.
MAX_DIFF_FORMAT, MAX_DIFF_SAME = 4e-3, 2e-5


def check() -> None:
    """Quantisers, then the path with and without a row of NaN."""
    check_quantisers()
    check_path()


def check_quantisers() -> None:
    """Equal codes and scales for finite values."""
    for num_rows, width in ((256, 512), (130, 384), (1536, 2048)):
        x = torch.randn(num_rows, width, device="cuda").bfloat16()
        x[:128, :128] *= 2.0**-40
        out, scales = make_slots([x[None]])
        convert_fp8([x[None]], out, scales, wanted_E=torch.ones(1, device="cuda").int())
        expected, expected_scale = per_block_cast_to_fp8(x, use_ue8m0=False)
        assert_same_fp8(f"per_block_cast_to_fp8 {num_rows, width}", expected[None], out[0])
        assert_close("its scales", expected_scale[None], scales[0], tolerance=0.0)
        expected, expected_scale = per_token_cast_to_fp8(x, use_ue8m0=False)
        q_TH, scale_TG = quantise_rows(x)
        assert_same_fp8(f"per_token_cast_to_fp8 {num_rows, width}", expected, q_TH)
        assert_close("its scales", expected_scale, scale_TG, tolerance=0.0)
    print("DeepGEMM's quantisers: equal")


def alignment() -> int:
    """Rows to which DeepGEMM wants every expert padded."""
    multiple = deep_gemm.get_mk_alignment_for_contiguous_layout()
    return multiple[0] if isinstance(multiple, tuple) else multiple


def expert_of_rows() -> Tensor:
    """int32, the expert of every row, -1 for padding."""
    multiple = alignment()
    parts = []
    for expert, num_rows in enumerate(ROWS_OF_EXPERTS):
        padding = -num_rows % multiple
        parts += [torch.full((num_rows,), expert), torch.full((padding,), -1)]
    return torch.cat(parts).int().cuda()


def back(values: Tensor, scale: Tensor) -> Tensor:
    """float32 from fp8 with a scale for 128 columns, or for blocks of 128x128."""
    if values.dim() == 3:
        scale = scale.repeat_interleave(128, 1)[:, : values.shape[1]]
    return values.float() * scale.repeat_interleave(128, -1)[..., : values.shape[-1]]


def grouped(x_TH: Tensor, weight_ENK: Tensor, expert_T: Tensor) -> Tensor:
    """Rows times the weights of their experts, in float32."""
    out = torch.zeros(len(x_TH), weight_ENK.shape[1], device="cuda")
    for expert in range(len(weight_ENK)):
        mine_T = expert_T == expert
        out[mine_T] = x_TH[mine_T].float() @ weight_ENK[expert].float().t()
    return out


def run_experts(
    x_TH: Tensor, expert_T: Tensor, weights: list[Tensor], scales: list[Tensor], column_major: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Both GEMMs in DeepGEMM: gate and up, output, and what lay between them in fp8."""
    q_TH = quantise_rows(x_TH, column_major=column_major)
    gate_up_TN = torch.empty(len(x_TH), weights[0].shape[1], device="cuda").bfloat16()
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(q_TH, (weights[0], scales[0]), gate_up_TN, expert_T)
    q_TI = silu_mul_quantise(gate_up_TN, column_major=column_major)
    out_TH = torch.empty_like(x_TH)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(q_TI, (weights[1], scales[1]), out_TH, expert_T)
    return gate_up_TN, out_TH, q_TI


def difference(x: Tensor, y: Tensor) -> float:
    """1 - 2xy / (xx + yy) in float64."""
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def check_path() -> None:
    """From bf16 rows and weights to the experts' outputs, in both layouts of scales."""
    num_experts, expert_T = len(ROWS_OF_EXPERTS), expert_of_rows()
    routed_T = expert_T >= 0
    x_TH = torch.randn(len(expert_T), HIDDEN, device="cuda").bfloat16()
    shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    weights = [
        (torch.randn(num_experts, n, k, device="cuda") / k**0.5).bfloat16() for n, k in shapes
    ]
    low, scales = make_slots(weights)
    convert_fp8(weights, low, scales, wanted_E=torch.ones(num_experts, device="cuda").int())
    gate_TI, up_TI = grouped(x_TH, weights[0], expert_T).chunk(2, dim=1)
    exact_TH = grouped(silu(gate_TI) * up_TI, weights[1], expert_T)
    for column_major in (False, True):
        gate_up_TN, out_TH, q_TI = run_experts(x_TH, expert_T, low, scales, column_major)
        emulated_TN = grouped(back(*quantise_rows(x_TH)), back(low[0], scales[0]), expert_T)
        emulated_TH = grouped(back(*q_TI), back(low[1], scales[1]), expert_T)
        for name, expected, out, allowed in (
            ("gate and up, same fp8", emulated_TN, gate_up_TN, MAX_DIFF_SAME),
            ("output, same fp8", emulated_TH, out_TH, MAX_DIFF_SAME),
            ("output, float32 on bf16", exact_TH, out_TH, MAX_DIFF_FORMAT),
        ):
            found = difference(expected[routed_T], out[routed_T])
            print(f"  DeepGEMM, {column_major=}: {name}: {found:.2e} (allowed {allowed:.0e})")
            assert found < allowed
        for expert, num_rows in enumerate(ROWS_OF_EXPERTS):
            mine_T = expert_T == expert
            if num_rows:
                found = difference(exact_TH[mine_T], out_TH[mine_T])
                assert found < 2 * MAX_DIFF_FORMAT, f"expert {expert} of {num_rows} rows: {found}"
        check_bad_row(x_TH, expert_T, low, scales, out_TH, column_major)
    print("DeepGEMM's grouped GEMMs on what the kernels make: within tolerance")


def check_bad_row(
    x_TH: Tensor,
    expert_T: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    clean_TH: Tensor,
    column_major: bool,
) -> None:
    """A row with a NaN or an Inf stays bad, and no other row changes."""
    for bad in (NAN, float("inf")):
        bad_TH = x_TH.clone()
        row = int((expert_T == 4).nonzero()[100])
        bad_TH[row, 77] = bad
        _, out_TH, _ = run_experts(bad_TH, expert_T, weights, scales, column_major)
        assert not out_TH[row].isfinite().any(), f"{bad} got lost"
        others_T = expert_T >= 0
        others_T[row] = False
        assert torch.equal(out_TH[others_T], clean_TH[others_T]), f"{bad} changed other rows"
