"""Reference of `token_amounts` in plain torch. Shape letters as in the package, N visual
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_VISION

EPS = 1e-6


def token_amounts(hidden_TD: Tensor, flags_T: Tensor, valid_T: Tensor, *, delta: float) -> Tensor:
    """See `sglang_moelb.kernels.token_amounts`. Runs wherever its tensors are."""
    amounts_T = torch.full_like(flags_T, AMOUNT_ONE, dtype=torch.int32)
    visual = (valid_T & ((flags_T & FLAG_VISION) != 0)).nonzero()[:, 0]
    entropy = _entropy(hidden_TD[visual].float())
    finite = entropy.isfinite()
    visual, entropy = visual[finite], entropy[finite].double()
    if not len(visual):
        return amounts_T
    mean = entropy.mean()
    normal = (entropy - mean) / ((entropy - mean).square().mean().sqrt() + EPS)
    units = torch.sigmoid(-delta * normal) * AMOUNT_ONE
    amounts_T[visual] = (units + 0.5).floor().clamp(1, AMOUNT_ONE).int()
    return amounts_T


def _entropy(states_ND: Tensor) -> Tensor:
    """Entropy in nats of the softmax of each row, at least 0."""
    shifted_ND = states_ND - states_ND.amax(dim=1, keepdim=True)
    exp_ND = shifted_ND.exp()
    sum_N = exp_ND.sum(dim=1)
    return (sum_N.log() - (exp_ND * shifted_ND).sum(dim=1) / sum_N).clamp(min=0)
