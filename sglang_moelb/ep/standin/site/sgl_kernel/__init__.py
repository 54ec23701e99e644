"""The module that SGLang imports as `sgl_kernel`, whose wheel exists for CUDA only.

Two functions that the CPU engine really calls are here in plain torch. Every other `*_cpu` name
can be imported, because SGLang does so without need, and raises when it is called. Operators that
SGLang looks up when a module is imported are declared without an implementation. Nothing registers
`convert_weight_packed`: with it SGLang would believe in AMX and leave its torch-native branches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.4.10+moelb.standin"

_DECLARED = (
    "fused_gdn_gating_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
)

_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in _DECLARED:
    _library.define(f"{_name}(Tensor x) -> Tensor")


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write the cache slots of each request into its row, columns start to end (host, in place)."""
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy cache rows `src_loc` to `tgt_loc` in every layer (host, in place; rows may overlap)."""
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + row * stride, stride) for row in src_loc.tolist()]
        for target, row in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (stand-in of sglang_moelb) has no {name!r}")

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU implementation in the stand-in")

    return missing
