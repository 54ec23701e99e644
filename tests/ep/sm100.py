"""A test double of a data-centre Blackwell under SGLang's own DeepGEMM runner, on the host.

SGLang's runner, its permutations and its wrapper are the real ones. Doubled is what needs the
device: DeepGEMM's grouped GEMM, and four kernels of SGLang's around it. Each takes exactly what the
real one takes and decodes it here from the definition of the number formats, in float32, with none
of our encoders: a wrong layout, recipe or offset is an error or a wrong number.

Shape letters: M rows in the experts' order, K features, N output features, E experts of a rank,
S scales of a row, W words of four scales, T received rows, H hidden size.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling

BLOCK_M = 128  # rows of a tile, all of one expert, in DeepGEMM's contiguous layout


def e2m1(code: torch.Tensor) -> torch.Tensor:
    """Values of 4-bit codes: a sign, two bits of exponent with bias 1, one bit of mantissa."""
    exponent, mantissa = (code >> 1) & 3, (code & 1).float()
    normal = (1 + mantissa / 2) * torch.exp2(exponent.float() - 1)
    return torch.where(exponent == 0, mantissa / 2, normal) * (1 - 2 * (code >> 3).float())


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Values of int8 pairs of e2m1, the first in the low bits: one more axis, then flat."""
    byte = codes.int() & 255
    return torch.stack((e2m1(byte & 15), e2m1(byte >> 4)), dim=-1).flatten(-2)


def powers(words: torch.Tensor, num_scales: int) -> torch.Tensor:
    """2**(byte - 127) of the first scales of each row of words, byte 0 the lowest; 255 is NaN."""
    byte = torch.stack([(words >> (8 * place)) & 255 for place in range(4)], dim=-1)
    byte = byte.flatten(-2)[..., :num_scales]
    return torch.exp2(byte.double() - 127).float().where(byte != 255, torch.nan)


class RecordedGemm(ModuleType):
    """A `deep_gemm` that keeps the sizes it was called with."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.calls: list[tuple[int, int, int]] = []


class DeepGemm(RecordedGemm):
    """`deep_gemm` as the FP4 path sees it on SM100 (csrc/apis/gemm.hpp, csrc/utils/layout.hpp)."""

    def m_grouped_fp8_fp4_gemm_nt_contiguous(
        self,
        a: tuple[torch.Tensor, torch.Tensor],
        b: tuple[torch.Tensor, torch.Tensor],
        d: torch.Tensor,
        m_indices: torch.Tensor,
        *,
        recipe_a: tuple[int, int],
        recipe_b: tuple[int, int],
    ) -> None:
        """`d[m] = a[m] @ b[m_indices[m]].T`, tiles of a negative index left out."""
        (x_MK, sfa), (weight, sfb) = a, b
        (num_rows, k), (num_groups, n, half_k) = x_MK.shape, weight.shape
        assert (x_MK.dtype, weight.dtype) == (torch.float8_e4m3fn, torch.int8)
        assert d.dtype is torch.bfloat16
        assert d.shape == (num_rows, n)
        assert m_indices.dtype is torch.int32
        assert m_indices.shape == (num_rows,)
        assert x_MK.is_contiguous()
        assert weight.is_contiguous()
        assert d.is_contiguous()
        assert half_k * 2 == k
        assert (recipe_a[0], recipe_b[0]) == (1, 1)
        check_scales(sfa, (num_rows, k), recipe_a[1])
        check_scales(sfb, (num_groups, n, k), recipe_b[1])
        self.calls.append((num_rows, n, k))
        of_rows = powers(sfa, k // recipe_a[1]).repeat_interleave(recipe_a[1], dim=-1)
        x_MK = x_MK.float() * of_rows
        plain: dict[int, torch.Tensor] = {}
        for start in range(0, num_rows, BLOCK_M):
            group = int(m_indices[start])
            tile = slice(start, start + BLOCK_M)
            assert (m_indices[tile] == group).all(), "a tile of two experts"
            if group >= 0 and group not in plain:
                of_block = powers(sfb[group], k // recipe_b[1]).repeat_interleave(recipe_b[1], -1)
                plain[group] = unpacked(weight[group]) * of_block
            if group >= 0:
                d[tile] = (x_MK[tile] @ plain[group].T).bfloat16()

    m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous  # DeepGEMM's alias


def check_scales(sf: torch.Tensor, shape: tuple[int, ...], granularity: int) -> None:
    """DeepGEMM's `check_sf_layout` for packed scales: four a word, along the rows, 16 bytes."""
    *_, num_rows, k = shape
    assert granularity in (32, 128)
    assert sf.dtype is torch.int32
    assert sf.shape == (*shape[:-1], -(-k // (4 * granularity)))
    assert sf.stride(-2) == 1 or num_rows == 1
    assert sf.stride(-1) == -(-num_rows // 4) * 4
    if sf.dim() == 3:
        assert sf.stride(0) == sf.stride(-1) * sf.shape[-1]


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
    assert scale_ue8m0
    num_words = -(-(recv_x.shape[1] // 128) // 4)
    assert recv_x_scale.dtype is output_tensor_scale.dtype is torch.int32
    assert recv_x_scale.shape[1] == output_tensor_scale.shape[1] == num_words
    scatter(
        recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert,
        output_tensor, output_tensor_scale, m_indices, output_index,
    )  # fmt: skip


def scatter(
    recv_x: torch.Tensor,
    recv_x_scale: torch.Tensor,
    recv_topk: torch.Tensor,
    num_recv_tokens_per_expert: torch.Tensor,
    output_tensor: torch.Tensor,
    output_tensor_scale: torch.Tensor,
    m_indices: torch.Tensor,
    output_index: torch.Tensor,
) -> None:
    """Rows and their scales side by side for each expert, whatever the scales are."""
    assert m_indices.shape[0] % BLOCK_M == 0
    output_tensor.view(torch.uint8).fill_(0x7F)  # NaN: what memory may hold
    starts = (num_recv_tokens_per_expert.cumsum(0) - num_recv_tokens_per_expert).tolist()
    for expert, start in enumerate(starts):
        m_indices[start : start + int(num_recv_tokens_per_expert[expert])] = expert
    output_index.fill_(-1)
    for row, ids in enumerate(recv_topk.tolist()):
        for column, expert in enumerate(ids):
            if 0 <= expert < len(starts):
                place = starts[expert]
                starts[expert] += 1
                output_index[row, column] = place
                output_tensor.view(torch.uint8)[place] = recv_x.view(torch.uint8)[row]
                output_tensor_scale[place] = recv_x_scale[row]


def ep_gather(
    input_tensor: torch.Tensor,
    recv_topk_ids: torch.Tensor,
    recv_topk_weight: torch.Tensor,
    input_index: torch.Tensor,
    output_tensor: torch.Tensor,
) -> None:
    """SGLang's kernel: the weighted sum of each row's places, in float32."""
    for row in range(len(output_tensor)):
        total = torch.zeros(output_tensor.shape[1])
        for column, place in enumerate(input_index[row].tolist()):
            if int(recv_topk_ids[row, column]) >= 0:
                total += input_tensor[place].float() * float(recv_topk_weight[row, column])
        output_tensor[row] = total.bfloat16()


def quantise_128(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 rows and the exponents + 127 of their groups of 128, by the definition, in float64."""
    groups = x.double().unflatten(-1, (-1, 128))
    exponent = (groups.abs().amax(-1).clamp(min=1e-10) / 448).log2().ceil()
    values = (groups / torch.exp2(exponent)[..., None]).float().to(torch.float8_e4m3fn)
    return values.flatten(-2), (exponent + 127).to(torch.int32)


def per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    column_major_scales: bool,
    scale_tma_aligned: bool,
    scale_ue8m0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's kernel between the GEMMs: powers of two, packed, along the rows."""
    assert group_size == 128
    assert column_major_scales
    assert scale_tma_aligned
    assert scale_ue8m0
    values, byte_MS = quantise_128(x)
    num_rows, num_scales = byte_MS.shape
    memory = torch.zeros(-(-num_scales // 4), -(-num_rows // 4) * 4, dtype=torch.int32)
    for place in range(num_scales):
        memory[place // 4, :num_rows] |= byte_MS[:, place] << (8 * (place % 4))
    return values, memory.T[:num_rows]


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """SGLang's kernel: the gate is the left half."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def blackwell(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (10, 0)) -> DeepGemm:
    """Make SGLang and the start believe in the double; the double that they will call."""
    from sglang.kernels.ops.moe import ep_moe_kernels
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, entrypoint
    from sglang.srt.layers.moe.moe_runner import deep_gemm as runner

    from sglang_moelb.ep.low import formats

    double = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", double)
    monkeypatch.setattr(formats, "capability_of", lambda device: capability)
    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    monkeypatch.setattr(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", True)
    monkeypatch.setattr(deep_gemm_wrapper, "DEEPGEMM_NEED_TMA_ALIGNED_SCALES", False)
    monkeypatch.setattr(entrypoint, "deep_gemm", double, raising=False)
    monkeypatch.setattr(compile_utils, "deep_gemm_execution_hook", lambda *sizes: nullcontext())
    monkeypatch.setattr(ep_moe_kernels, "ep_scatter", ep_scatter)
    monkeypatch.setattr(ep_moe_kernels, "ep_gather", ep_gather)
    monkeypatch.setattr(
        fp8_kernel, "sglang_per_token_group_quant_fp8", per_token_group_quant_fp8
    )
    monkeypatch.setattr(runner, "_legacy_silu_and_mul", silu_and_mul)
    monkeypatch.setattr(runner, "_is_musa", False)
    for name, answer in (
        ("get_offloader", SimpleNamespace(forbid_copy_engine_usage=True)),
        ("use_symmetric_memory", nullcontext()),
        ("is_allocation_symmetric", False),
        ("get_parallel", SimpleNamespace(tp_group=None)),
        ("get_exec", SimpleNamespace(
            deterministic=SimpleNamespace(enable_deterministic_inference=False)
        )),
        ("get_moe_a2a_backend", SimpleNamespace(is_megamoe=lambda: False)),
    ):  # fmt: skip
        monkeypatch.setattr(runner, name, lambda *_, _answer=answer, **__: _answer)
    monkeypatch.setattr(
        runner, "copy_list_to_gpu_no_ce", lambda counts: torch.tensor(counts, dtype=torch.int32)
    )
    monkeypatch.setattr(runner, "dispose_tensor", lambda x: x.set_(x.new_empty(0)))
    return double


def sglang_runner() -> Any:
    """SGLang's `MoeRunner` with its DeepGEMM core; after `blackwell`."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmRunnerCore
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    made = object.__new__(MoeRunner)
    made.config = MoeRunnerConfig()
    made.runner_backend, made.lora_enabled = MoeRunnerBackend.DEEP_GEMM, False
    made.fused_func = made.down_gemm_overlap_args = made.meta_overlap_args = None
    made.runner_core = DeepGemmRunnerCore(made.config)
    return made
