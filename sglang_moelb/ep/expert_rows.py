"""What all that runs experts in another way than SGLang knows of its MoE layers under DeepEP.

Shape letters: N received rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

WEIGHTS = ("w13_weight", "w2_weight")  # parameters of a MoE layer, local expert first
MAX_LOCAL_EXPERTS = 128  # of a rank: an assertion of DeepEP's intranode dispatch


def in_dtype(combine_input: Any, dtype: torch.dtype) -> Any:
    """`combine_input` with its rows in `dtype`."""
    return combine_input._replace(hidden_states=combine_input.hidden_states.to(dtype))


def in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """On a GPU the tensor itself, as others are refused at start; the host serves float32 too."""
    return tensor.to(torch.bfloat16)


def dispose(rows_NH: torch.Tensor) -> None:
    """Free received rows, as SGLang's runner does once it has scattered them."""
    if rows_NH.is_cuda:
        from sglang.srt.utils import dispose_tensor

        dispose_tensor(rows_NH)
