"""MACS: how much each token weighs against a capacity.

Shape letters: T tokens of this rank (may be 0), D hidden features.
"""

from __future__ import annotations

from torch import Tensor

from sglang_moelb.kernels.token_amounts import ref

__all__ = ["token_amounts"]


def token_amounts(hidden_TD: Tensor, flags_T: Tensor, valid_T: Tensor, *, delta: float) -> Tensor:
    """Weigh visual tokens by the entropy of their hidden state: flat background weighs little.

    Source: MACS, arXiv 2605.05225 (formulas as quoted in docs/algorithms; the feature, eps and the
    unit are ours). H is the entropy of the softmax over D in float32, Hn = (H - mean) / (std +
    1e-6) over this rank's valid visual tokens (population std, in float64), and the amount is
    floor(sigmoid(-delta * Hn) * AMOUNT_ONE + 1/2), clamped to 1..AMOUNT_ONE. Text, tokens that are
    not valid, and hidden states that are not finite weigh AMOUNT_ONE.

    Args:
        hidden_TD: bfloat16 or float32, the input of the MoE layer. Rows may be strided.
        flags_T: uint8, FLAG_VISION.
        valid_T: bool, False for padding.
        delta: sharpness; 0 gives every visual token half.

    Returns:
        amounts_T int32. Equal on every run; host and device may differ by 1 unit where the std of H
        is above 1e-3, because they round logarithms and sums differently. No host sync.
    """
    if hidden_TD.is_cuda:
        # Imported late, because a host without a CUDA device may lack Triton.
        from sglang_moelb.kernels.token_amounts import kernel

        return kernel.token_amounts(hidden_TD, flags_T, valid_T, delta=delta)
    return ref.token_amounts(hidden_TD, flags_T, valid_T, delta=delta)
