"""A test double of a Hopper under SGLang's own DeepGEMM runner, on the host: `sm100` in FP8.

As there, SGLang's runner is the real one, and what needs the device is decoded from definitions:
float8 rows with a float32 scale for 128 columns, weights with one for 128x128.

Shape letters: M rows in the experts' order, N output features.
"""

from __future__ import annotations

import sys

import pytest
import torch

from .sm100 import BLOCK_M, RecordedGemm, blackwell, scatter


class DeepGemm(RecordedGemm):
    """`deep_gemm` as the FP8 path sees it on SM90 (csrc/apis/gemm.hpp, csrc/utils/layout.hpp)."""

    def m_grouped_fp8_gemm_nt_contiguous(
        self,
        a: tuple[torch.Tensor, torch.Tensor],
        b: tuple[torch.Tensor, torch.Tensor],
        d: torch.Tensor,
        m_indices: torch.Tensor,
    ) -> None:
        """`d[m] = a[m] @ b[m_indices[m]].T`, tiles of a negative index left out."""
        (x_MK, sfa), (weight, sfb) = a, b
        (num_rows, k), (num_groups, n, of_weight) = x_MK.shape, weight.shape
        assert x_MK.dtype is weight.dtype is torch.float8_e4m3fn
        assert of_weight == k
        assert (d.dtype, d.shape) == (torch.bfloat16, (num_rows, n))
        assert (m_indices.dtype, m_indices.shape) == (torch.int32, (num_rows,))
        assert all(t.is_contiguous() for t in (x_MK, weight, d, sfb))
        assert sfa.dtype is sfb.dtype is torch.float32
        assert sfa.shape == (num_rows, k // 128)
        assert sfa.stride() == (1, -(-num_rows // 4) * 4), "scales along the rows, 16 bytes"
        assert sfb.shape == (num_groups, n // 128, k // 128)
        self.calls.append((num_rows, n, k))
        x_MK = x_MK.float() * sfa.repeat_interleave(128, dim=1)
        for start in range(0, num_rows, BLOCK_M):
            group, tile = int(m_indices[start]), slice(start, start + BLOCK_M)
            assert (m_indices[tile] == group).all(), "a tile of two experts"
            if group >= 0:
                of_block = sfb[group].repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
                d[tile] = (x_MK[tile] @ (weight[group].float() * of_block).T).bfloat16()


def ep_scatter(
    recv_x: torch.Tensor,
    recv_x_scale: torch.Tensor,
    recv_topk: torch.Tensor,
    num_recv_tokens_per_expert: torch.Tensor,
    num_valid_tokens_per_expert: torch.Tensor,
    expert_start_loc: torch.Tensor,
    output_tensor: torch.Tensor,
    output_tensor_scale: torch.Tensor,
    m_indices: torch.Tensor,
    output_index: torch.Tensor,
    scale_ue8m0: bool,
) -> None:
    """SGLang's kernel: rows of each expert side by side; what is between them is not written."""
    assert not scale_ue8m0
    num_scales = recv_x.shape[1] // 128
    assert recv_x_scale.dtype is output_tensor_scale.dtype is torch.float32
    assert recv_x_scale.shape[1] == output_tensor_scale.shape[1] == num_scales
    output_tensor_scale.fill_(torch.nan)
    scatter(
        recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert,
        output_tensor, output_tensor_scale, m_indices, output_index,
    )  # fmt: skip


def tma_align_input_scale(input_scale: torch.Tensor) -> torch.Tensor:
    """SGLang's kernel: the same scales along the rows."""
    num_rows, num_scales = input_scale.shape
    memory = torch.full((num_scales, -(-num_rows // 4) * 4), torch.nan)
    memory[:, :num_rows] = input_scale.T
    return memory.T[:num_rows]


def quantise_128(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and float32 scales of their groups of 128 along a row, by DeepGEMM's definition.

    In float32, as there: bfloat16 often lies between two e4m3 values, and rounding decides.
    """
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448
    values = (groups * (1 / scale)[..., None]).to(torch.float8_e4m3fn)
    return values.flatten(-2), scale


def per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    column_major_scales: bool,
    scale_tma_aligned: bool,
    scale_ue8m0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's kernel between the GEMMs: scales as they are, along the columns."""
    assert group_size == 128
    assert not column_major_scales
    assert not scale_tma_aligned
    assert not scale_ue8m0
    return quantise_128(x)


def hopper(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    """Make SGLang and the start believe in the double; the double that they will call."""
    from sglang.kernels.ops.moe import ep_moe_kernels
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.deep_gemm_wrapper import entrypoint

    blackwell(monkeypatch, (9, 0))
    double = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", double)
    monkeypatch.setattr(entrypoint, "deep_gemm", double, raising=False)
    monkeypatch.setattr(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", False)
    monkeypatch.setattr(deep_gemm_wrapper, "DEEPGEMM_NEED_TMA_ALIGNED_SCALES", True)
    monkeypatch.setattr(ep_moe_kernels, "ep_scatter", ep_scatter)
    monkeypatch.setattr(ep_moe_kernels, "tma_align_input_scale", tma_align_input_scale)
    monkeypatch.setattr(
        fp8_kernel, "sglang_per_token_group_quant_fp8", per_token_group_quant_fp8
    )
    return double
