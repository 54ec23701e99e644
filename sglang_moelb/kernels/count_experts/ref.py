"""Reference of `count_experts` in plain torch.

Tokens fall in 4 classes, which their flags number: text, vision, protected text, protected vision.
Everything is a few `bincount`s by class, because on CPU this is what serves, in every layer.
Shape letters: as in the package; E experts, B bins, N entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.keys import KeyRule, row_keys

NUM_CLASSES = 4
CLASS_MASK = layout.FLAG_VISION | layout.FLAG_PROTECTED
# What a row of each class adds to H_TOKENS, H_VISION_TOKENS and H_PROTECTED_TOKENS, and (without
# the first column) what an amount adds to H_VISION_AMOUNT and H_AMOUNT.
TOKENS_BY_CLASS = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
TOKEN_AMOUNTS_BY_CLASS = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]])
# The same for C_TEXT_ROWS, C_VISION_ROWS, C_PROTECTED_ROWS of routed rows.
ROWS_BY_CLASS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]])
# And for C_PROTECTED_AMOUNT and C_CUTTABLE_AMOUNT where every row weighs 1.
AMOUNTS_BY_CLASS = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])


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
        _header((ids_TC[:, :topk] >= 0).any(dim=1), class_T, amounts_T),
        _counts(codes_TC, amounts_T, num_experts, topk),
    ]
    keys_TC = None
    if key_rule is not None:
        keys_TC = row_keys(ids_TC, weights_TC, flags_T, amounts_T, key_rule, topk)
        keys_TC = keys_TC.where(valid_TC, 0)
        cuttable_TC = valid_TC & (class_T < layout.FLAG_PROTECTED)[:, None]
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
    rows_LE4 = _sums(codes_LTK.where(valid_LTK, num_layers * size), None, num_layers * size)
    rows_LE4 = rows_LE4.view(num_layers, num_experts, NUM_CLASSES)
    codes_LT = layer_L1 * NUM_CLASSES + class_T
    num_codes = num_layers * NUM_CLASSES
    counted_LT = (ids_LTK >= 0).any(dim=2)
    tokens_L4 = _sums(codes_LT.where(counted_LT, num_codes), None, num_codes).view(num_layers, -1)
    header_L8 = tokens_L4.new_zeros(num_layers, layout.NUM_HEADER)
    header_L8[:, : layout.H_VISION_AMOUNT] = tokens_L4 @ TOKENS_BY_CLASS
    header_L8[:, layout.H_VISION_AMOUNT : layout.H_AMOUNT + 1] = tokens_L4 @ TOKEN_AMOUNTS_BY_CLASS
    counts_LE5 = torch.cat([rows_LE4 @ ROWS_BY_CLASS, rows_LE4 @ AMOUNTS_BY_CLASS], dim=2)
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


def _header(counted_T: Tensor, class_T: Tensor, amounts_T: Tensor | None) -> Tensor:
    codes_T1 = class_T.where(counted_T, NUM_CLASSES)[:, None]
    tokens_4 = _sums(codes_T1, None, NUM_CLASSES)
    amounts_4 = tokens_4 if amounts_T is None else _sums(codes_T1, amounts_T, NUM_CLASSES)
    header = tokens_4.new_zeros(layout.NUM_HEADER)
    header[: layout.H_VISION_AMOUNT] = tokens_4 @ TOKENS_BY_CLASS
    header[layout.H_VISION_AMOUNT : layout.H_AMOUNT + 1] = amounts_4 @ TOKEN_AMOUNTS_BY_CLASS
    return header


def _counts(codes_TC: Tensor, amounts_T: Tensor | None, num_experts: int, topk: int) -> Tensor:
    size, by_class = num_experts * NUM_CLASSES, (num_experts, NUM_CLASSES)
    codes_TK = codes_TC[:, :topk]
    rows_E4 = _sums(codes_TK, None, size).view(by_class)
    routed_E4 = rows_E4 if amounts_T is None else _sums(codes_TK, amounts_T, size).view(by_class)
    all_E4 = routed_E4
    if codes_TC.shape[1] > topk:
        all_E4 = routed_E4 + _sums(codes_TC[:, topk:], amounts_T, size).view(by_class)
    counts_E5 = rows_E4.new_empty(num_experts, layout.NUM_COUNTS)
    counts_E5[:, : layout.C_PROTECTED_AMOUNT] = rows_E4 @ ROWS_BY_CLASS
    counts_E5[:, layout.C_PROTECTED_AMOUNT] = routed_E4[:, layout.FLAG_PROTECTED :].sum(dim=1)
    counts_E5[:, layout.C_CUTTABLE_AMOUNT] = all_E4[:, : layout.FLAG_PROTECTED].sum(dim=1)
    return counts_E5
