"""The sparse layer for training: sort rows by expert, two grouped products, sum back.

Plain torch; device. No host synchronisation in the grouped form.

Shape letters: T tokens, K top-k, N = T*K rows, E experts, H hidden, I expert size, O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Products = Literal["grouped", "loop"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where each of the T*K rows goes when rows are sorted by expert."""

    order_N: Tensor  # sorted place -> row
    inverse_N: Tensor  # row -> sorted place
    ends_E: Tensor  # int32, the end of each expert's rows
    topk: int


def sort_rows(experts_TK: Tensor, num_experts: int) -> Rows:
    """Stable order of the rows by expert.

    Example: two tokens with experts (1, 0) and (1, 2) give order (1, 0, 2, 3), ends (1, 3, 4).
    """
    keys_N = experts_TK.reshape(-1).to(torch.uint8)
    sorted_N, order_N = torch.sort(keys_N, stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    bounds_E = torch.arange(num_experts, device=keys_N.device, dtype=torch.uint8)
    ends_E = torch.searchsorted(sorted_N, bounds_E, right=True, out_int32=True)
    return Rows(order_N, inverse_N, ends_E, experts_TK.shape[1])


class _Spread(torch.autograd.Function):
    """Rows of the tokens in sorted order; its adjoint is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_TH[rows.order_N // rows.topk]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        return _sum_rows(grads[0], rows), None


class _Gather(torch.autograd.Function):
    """The sum of each token's rows; its adjoint is `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y_NH: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _sum_rows(y_NH, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        return grads[0][rows.order_N // rows.topk], None


def _sum_rows(y_NH: Tensor, rows: Rows) -> Tensor:
    return y_NH[rows.inverse_N].view(-1, rows.topk, y_NH.shape[-1]).sum(1)


def multiply(x_NI: Tensor, weight_EOI: Tensor, rows: Rows, products: Products) -> Tensor:
    """[N, O]: each row times its expert's matrix. `loop` copies the ends to the host."""
    if products == "grouped":
        return functional.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=rows.ends_E)
    ends = [0, *rows.ends_E.tolist()]
    parts = [
        functional.linear(x_NI[begin:end], weight)
        for begin, end, weight in zip(ends[:-1], ends[1:], weight_EOI, strict=True)
    ]
    return torch.cat(parts)


def gated(both_NI: Tensor, share_N: Tensor) -> Tensor:
    """SiLU of the first half times the second half times the row's share."""
    gate, up = both_NI.chunk(2, dim=-1)
    return functional.silu(gate) * up * share_N.unsqueeze(-1)


def run_experts(
    x_TH: Tensor,
    experts_TK: Tensor,
    share_TK: Tensor,
    gate_up_EOI: Tensor,
    down_EOI: Tensor,
    *,
    products: Products,
) -> Tensor:
    """[T, H]: the sum over the K experts of each token, weighted by `share_TK`.

    The share multiplies before the second product, which is linear, so one pass less is written.
    """
    rows = sort_rows(experts_TK, gate_up_EOI.shape[0])
    spread_NH: Tensor = _Spread.apply(x_TH, rows)  # type: ignore[no-untyped-call]
    both_NI = multiply(spread_NH, gate_up_EOI, rows, products)
    inner_NI = gated(both_NI, share_TK.reshape(-1)[rows.order_N])
    out_NH = multiply(inner_NI, down_EOI, rows, products)
    out_TH: Tensor = _Gather.apply(out_NH, rows)  # type: ignore[no-untyped-call]
    return out_TH


def balance_loss(probs_TE: Tensor, loads_E: Tensor) -> Tensor:
    """Scalar, top-k when balanced: Switch Transformer (2101.03961) eq. 4-6 as Mixtral uses it.

    E times the sum over experts of (rows routed to it per token) times (its mean probability).
    """
    num_tokens, num_experts = probs_TE.shape
    return num_experts * torch.sum(loads_E / num_tokens * probs_TE.mean(0))


def count(keys_N: Tensor, num_keys: int) -> Tensor:
    """[num_keys] float32: how often each key occurs, without a host synchronisation."""
    counts = torch.zeros(num_keys, device=keys_N.device)
    return counts.scatter_add_(0, keys_N.long(), torch.ones_like(keys_N, dtype=torch.float32))
