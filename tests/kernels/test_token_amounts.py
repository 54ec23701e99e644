"""`token_amounts` equals MACS's formula token by token, within one unit of rounding.

Shape letters: T tokens, D hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.kernels.testing import random_routing


@pytest.fixture
def token_amounts(load_op: Callable) -> Callable:
    return load_op("token_amounts")


def loop_amounts(hidden_TD: Tensor, flags_T: Tensor, valid_T: Tensor, delta: float) -> list[int]:
    """MACS's formula in Python floats."""
    entropies: dict[int, float] = {}
    for t, state in enumerate(hidden_TD.float().tolist()):
        if valid_T[t] and flags_T[t] & FLAG_VISION:
            exps = [math.exp(z - max(state)) for z in state]
            shares = [e / sum(exps) for e in exps]
            entropies[t] = -sum(p * math.log(p) for p in shares if p > 0)
    amounts = [AMOUNT_ONE] * len(hidden_TD)
    if entropies:
        mean = sum(entropies.values()) / len(entropies)
        std = math.sqrt(sum((h - mean) ** 2 for h in entropies.values()) / len(entropies))
        for t, entropy in entropies.items():
            weight = 1 / (1 + math.exp(delta * (entropy - mean) / (std + 1e-6)))
            amounts[t] = min(max(math.floor(weight * AMOUNT_ONE + 0.5), 1), AMOUNT_ONE)
    return amounts


def random_states(
    num_tokens: int, width: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_TD of very different sharpness, flags_T and valid_T."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_T1 = torch.rand(num_tokens, 1, generator=generator) * 4
    hidden_TD = torch.randn(num_tokens, width, generator=generator) * sharpness_T1
    flags_T = random_routing(num_tokens, 1, 4, seed).flags_T
    valid_T = torch.rand(num_tokens, generator=generator) < 0.8
    return hidden_TD.to(dtype), flags_T, valid_T


def assert_amounts(token_amounts: Callable, *args: Tensor, delta: float) -> None:
    amounts_T = token_amounts(*args, delta=delta)
    assert amounts_T.dtype == torch.int32
    expected = loop_amounts(*args, delta=delta)
    assert len(amounts_T) == len(expected)
    wrong = [
        (t, out, ref)
        for t, (out, ref) in enumerate(zip(amounts_T.tolist(), expected, strict=True))
        if abs(out - ref) > 1
    ]
    assert not wrong, f"first (token, amount, expected): {wrong[:5]}"


def test_the_worked_example_of_the_docstring(token_amounts: Callable) -> None:
    amounts_T = token_amounts(
        torch.tensor([[0.0, 0.0], [100.0, 0.0], [5.0, 5.0]]),
        torch.tensor([FLAG_VISION, FLAG_VISION, 0], dtype=torch.uint8),
        torch.ones(3, dtype=torch.bool),
        delta=1.0,
    )
    assert amounts_T.tolist() == [69, 187, 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 8), (70, 33), (150, 64)])
def test_it_equals_the_formula_token_by_token(
    token_amounts: Callable, num_tokens: int, width: int, dtype: torch.dtype
) -> None:
    states = random_states(num_tokens, width, num_tokens, dtype)
    for delta in (0.5, 1.0, 3.0):
        assert_amounts(token_amounts, *states, delta=delta)


def test_text_and_padding_weigh_one_and_do_not_move_the_visual_tokens(
    token_amounts: Callable,
) -> None:
    hidden_TD, flags_T, valid_T = random_states(60, 16, 3, torch.float32)
    amounts_T = token_amounts(hidden_TD, flags_T, valid_T, delta=1.0)
    visual_T = valid_T & ((flags_T & FLAG_VISION) != 0)
    assert (amounts_T[~visual_T] == AMOUNT_ONE).all()
    assert (amounts_T[visual_T] < AMOUNT_ONE).any()
    noisy_TD = hidden_TD.masked_fill(~visual_T[:, None], 77.0)
    assert torch.equal(token_amounts(noisy_TD, flags_T, valid_T, delta=1.0), amounts_T)


def test_protected_visual_tokens_weigh_like_the_others(token_amounts: Callable) -> None:
    hidden_TD, flags_T, valid_T = random_states(40, 16, 4, torch.float32)
    amounts_T = token_amounts(hidden_TD, flags_T, valid_T, delta=1.0)
    protected_T = flags_T | FLAG_PROTECTED
    assert torch.equal(token_amounts(hidden_TD, protected_T, valid_T, delta=1.0), amounts_T)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_equal_visual_tokens_weigh_half(token_amounts: Callable, num_tokens: int) -> None:
    hidden_TD = torch.linspace(-1, 1, 20).repeat(num_tokens, 1)
    flags_T = torch.full((num_tokens,), FLAG_VISION, dtype=torch.uint8)
    amounts_T = token_amounts(hidden_TD, flags_T, torch.ones(num_tokens).bool(), delta=1.0)
    assert amounts_T.tolist() == [128] * num_tokens


def test_flat_states_weigh_less_than_peaked_ones(token_amounts: Callable) -> None:
    peaks = torch.arange(0, 8).float()
    hidden_TD = torch.zeros(8, 32)
    hidden_TD[:, 0] = peaks
    flags_T = torch.full((8,), FLAG_VISION, dtype=torch.uint8)
    amounts = token_amounts(hidden_TD, flags_T, torch.ones(8).bool(), delta=1.0).tolist()
    assert amounts == sorted(amounts)
    assert len(set(amounts)) > 4


def test_states_that_are_not_finite_weigh_one_and_leave_the_others_alone(
    token_amounts: Callable,
) -> None:
    hidden_TD, _, _ = random_states(12, 16, 6, torch.float32)
    flags_T = torch.full((12,), FLAG_VISION, dtype=torch.uint8)
    valid_T = torch.ones(12).bool()
    valid_T[3:5] = False
    expected_T = token_amounts(hidden_TD, flags_T, valid_T, delta=1.0)
    hidden_TD[3, 2], hidden_TD[4, 0] = math.nan, math.inf
    amounts_T = token_amounts(hidden_TD, flags_T, torch.ones(12).bool(), delta=1.0)
    assert torch.equal(amounts_T, expected_T)


def test_amounts_never_leave_1_to_256(token_amounts: Callable) -> None:
    states = random_states(100, 16, 7, torch.float32)
    amounts_T = token_amounts(*states, delta=100.0)
    assert amounts_T.min() == 1
    assert amounts_T.max() == AMOUNT_ONE
