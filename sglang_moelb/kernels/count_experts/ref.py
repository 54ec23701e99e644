"""Reference of `count_experts` in plain torch. Shape letters as in the package, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.keys import KeyRule, row_keys


def count_experts(
    ids_TC: Tensor,
    weights_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    *,
    num_experts: int,
    topk: int,
    key_rule: KeyRule | None,
) -> tuple[Tensor, Tensor | None]:
    """See `sglang_moelb.kernels.count_experts`. Runs wherever its tensors are."""
    width = layout.row_width(num_experts, with_histogram=key_rule is not None)
    row_W = torch.zeros(width, dtype=torch.int32, device=ids_TC.device)
    amount_T = torch.ones_like(flags_T, dtype=torch.int32) if amounts_T is None else amounts_T
    _fill_header(row_W, ids_TC[:, :topk], flags_T, amount_T)
    valid_TC = (ids_TC >= 0) & (ids_TC < num_experts)
    _fill_counts(row_W, ids_TC, valid_TC, flags_T, amount_T, num_experts, topk)
    if key_rule is None:
        return row_W, None
    keys_TC = row_keys(ids_TC, weights_TC, flags_T, amounts_T, key_rule).where(valid_TC, 0)
    cuttable_TC = valid_TC & ((flags_T & layout.FLAG_PROTECTED) == 0)[:, None]
    bins = ids_TC[cuttable_TC] * layout.NUM_BINS + (keys_TC[cuttable_TC] >> layout.BIN_SHIFT)
    amounts = amount_T[:, None].expand(ids_TC.shape)[cuttable_TC]
    histogram = layout.histogram_of(row_W, num_experts).view(-1)
    histogram.scatter_add_(0, bins.long(), amounts)
    return row_W, keys_TC


def _fill_header(row_W: Tensor, ids_TK: Tensor, flags_T: Tensor, amount_T: Tensor) -> None:
    token_T = (ids_TK >= 0).any(dim=1)
    vision_T = token_T & ((flags_T & layout.FLAG_VISION) != 0)
    protected_T = token_T & ((flags_T & layout.FLAG_PROTECTED) != 0)
    row_W[layout.H_TOKENS] = token_T.sum()
    row_W[layout.H_VISION_TOKENS] = vision_T.sum()
    row_W[layout.H_PROTECTED_TOKENS] = protected_T.sum()
    row_W[layout.H_VISION_AMOUNT] = (amount_T * vision_T).sum()
    row_W[layout.H_AMOUNT] = (amount_T * token_T).sum()


def _fill_counts(
    row_W: Tensor,
    ids_TC: Tensor,
    valid_TC: Tensor,
    flags_T: Tensor,
    amount_T: Tensor,
    num_experts: int,
    topk: int,
) -> None:
    vision_T = ((flags_T & layout.FLAG_VISION) != 0).int()
    protected_T = ((flags_T & layout.FLAG_PROTECTED) != 0).int()
    fields_T5 = torch.stack(
        (
            1 - vision_T,
            vision_T,
            protected_T,
            protected_T * amount_T,
            (1 - protected_T) * amount_T,
        ),
        dim=1,
    )
    tokens, columns = valid_TC.nonzero(as_tuple=True)
    values_N5 = fields_T5[tokens]
    values_N5[columns >= topk, : layout.C_CUTTABLE_AMOUNT] = 0
    counts_E5 = layout.counts_of(row_W, num_experts)
    counts_E5.index_add_(0, ids_TC[tokens, columns].long(), values_N5)
