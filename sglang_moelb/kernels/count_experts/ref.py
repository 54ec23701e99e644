"""Reference of `count_experts` in plain torch.

Tokens fall in 8 classes, which their flags number: 2 is protected text, 7 refused vision.
Everything is a few `bincount`s by class, because on CPU this is what serves, in every layer.
Shape letters: as in the package; E experts, B bins, N entries, F classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.keys import KeyRule, row_keys

CLASS_MASK = layout.FLAG_VISION | layout.FLAG_PROTECTED | layout.FLAG_REFUSED
NUM_CLASSES = CLASS_MASK + 1
CLASS_F = torch.arange(NUM_CLASSES)
ONE_F = torch.ones_like(CLASS_F)
VISION_F, PROTECTED_F, REFUSED_F = (
    (CLASS_F & flag != 0).long()
    for flag in (layout.FLAG_VISION, layout.FLAG_PROTECTED, layout.FLAG_REFUSED)
)
# What a token of each class adds to H_TOKENS, H_VISION_TOKENS and H_PROTECTED_TOKENS (REFUSED_F is
# what it adds to H_REFUSED_TOKENS), and its amount to H_VISION_AMOUNT and H_AMOUNT.
TOKENS_BY_CLASS = torch.stack([ONE_F, VISION_F, PROTECTED_F], dim=1)
TOKEN_AMOUNTS_BY_CLASS = torch.stack([VISION_F, ONE_F], dim=1)
# What a routed row adds to C_TEXT_ROWS, C_VISION_ROWS and C_REFUSED_ROWS.
ROWS_BY_CLASS = torch.stack([ONE_F - VISION_F, VISION_F, REFUSED_F], dim=1)
# And an amount to C_PROTECTED_AMOUNT and C_CUTTABLE_AMOUNT.
AMOUNTS_BY_CLASS = torch.stack([PROTECTED_F, ONE_F - PROTECTED_F], dim=1)


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
    """See `sglang_moelb.kernels.count_experts`. Runs on the host."""
    class_T = (flags_T & CLASS_MASK).long()
    valid_TC = (ids_TC >= 0) & (ids_TC < num_experts)
    codes_TC = (ids_TC * NUM_CLASSES + class_T[:, None]).where(valid_TC, num_experts * NUM_CLASSES)
    parts = [
        _header_of((ids_TC[:, :topk] >= 0).any(dim=1), class_T, amounts_T),
        _counts(codes_TC, amounts_T, num_experts, topk),
    ]
    keys_TC = None
    if key_rule is not None:
        keys_TC = row_keys(ids_TC, weights_TC, flags_T, amounts_T, key_rule, topk)
        keys_TC = keys_TC.where(valid_TC, 0)
        cuttable_TC = valid_TC & ((class_T & layout.FLAG_PROTECTED) == 0)[:, None]
        size = num_experts * layout.NUM_BINS
        bins_TC = ids_TC * layout.NUM_BINS + (keys_TC >> layout.BIN_SHIFT)
        parts.append(_sums(bins_TC.where(cuttable_TC, size), amounts_T, size))
    return torch.cat([part.flatten() for part in parts]).int(), keys_TC


def count_layers(
    ids_LTK: Tensor, flags_T: Tensor, *, num_experts: int, out_LW: Tensor | None = None
) -> Tensor:
    """See `sglang_moelb.kernels.count_experts`. Runs on the host."""
    num_layers, size = ids_LTK.shape[0], num_experts * NUM_CLASSES
    class_T = (flags_T & CLASS_MASK).long()
    layer_L1 = torch.arange(num_layers)[:, None]
    valid_LTK = (ids_LTK >= 0) & (ids_LTK < num_experts)
    codes_LTK = layer_L1[..., None] * size + ids_LTK * NUM_CLASSES + class_T[:, None]
    rows_LEF = _sums(codes_LTK.where(valid_LTK, num_layers * size), None, num_layers * size)
    rows_LEF = rows_LEF.view(num_layers, num_experts, NUM_CLASSES)
    codes_LT = layer_L1 * NUM_CLASSES + class_T
    num_codes = num_layers * NUM_CLASSES
    counted_LT = (ids_LTK >= 0).any(dim=2)
    tokens_LF = _sums(codes_LT.where(counted_LT, num_codes), None, num_codes).view(num_layers, -1)
    header_L8 = _header(tokens_LF, tokens_LF)
    counts_LE5 = torch.cat([rows_LEF @ ROWS_BY_CLASS, rows_LEF @ AMOUNTS_BY_CLASS], dim=2)
    rows_LW = torch.cat([header_L8, counts_LE5.flatten(1)], dim=1).int()
    return rows_LW if out_LW is None else out_LW.copy_(rows_LW)


def _sums(codes_TC: Tensor, amounts_T: Tensor | None, size: int) -> Tensor:
    """Amounts by code, as int64 of `size`; the code `size` stands for no row."""
    if amounts_T is None:
        return torch.bincount(codes_TC.flatten(), minlength=size + 1)[:size]
    # Sums of the float64 that bincount makes of amounts are exact up to 2**53.
    amounts_TC = amounts_T.double()[:, None].expand(codes_TC.shape)
    sums = torch.bincount(codes_TC.flatten(), amounts_TC.flatten(), minlength=size + 1)
    return sums[:size].long()


def _header_of(counted_T: Tensor, class_T: Tensor, amounts_T: Tensor | None) -> Tensor:
    codes_T1 = class_T.where(counted_T, NUM_CLASSES)[:, None]
    tokens_F = _sums(codes_T1, None, NUM_CLASSES)
    amounts_F = tokens_F if amounts_T is None else _sums(codes_T1, amounts_T, NUM_CLASSES)
    return _header(tokens_F, amounts_F)


def _header(tokens_F: Tensor, amounts_F: Tensor) -> Tensor:
    """The header of one row, or of many in leading dimensions."""
    header_8 = tokens_F.new_zeros(*tokens_F.shape[:-1], layout.NUM_HEADER)
    header_8[..., : layout.H_VISION_AMOUNT] = tokens_F @ TOKENS_BY_CLASS
    header_8[..., layout.H_VISION_AMOUNT : layout.H_AMOUNT + 1] = amounts_F @ TOKEN_AMOUNTS_BY_CLASS
    header_8[..., layout.H_REFUSED_TOKENS] = tokens_F @ REFUSED_F
    return header_8


def _counts(codes_TC: Tensor, amounts_T: Tensor | None, num_experts: int, topk: int) -> Tensor:
    size, by_class = num_experts * NUM_CLASSES, (num_experts, NUM_CLASSES)
    codes_TK = codes_TC[:, :topk]
    rows_EF = _sums(codes_TK, None, size).view(by_class)
    amounts_EF = rows_EF if amounts_T is None else _sums(codes_TK, amounts_T, size).view(by_class)
    counts_E5 = torch.cat([rows_EF @ ROWS_BY_CLASS, amounts_EF @ AMOUNTS_BY_CLASS], dim=1)
    if codes_TC.shape[1] > topk:
        extra_EF = _sums(codes_TC[:, topk:], amounts_T, size).view(by_class)
        counts_E5[:, layout.C_CUTTABLE_AMOUNT] += extra_EF @ (ONE_F - PROTECTED_F)
    return counts_E5
