"""`sum_words` is the same for equal runs of bytes and another for any change that a move can make.

Shape letters: B bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MODULUS = 1 << 64


@pytest.fixture
def sum_words(load_op: Callable) -> Callable:
    return load_op("sum_words")


def drawn(num_bytes: int) -> Tensor:
    return torch.randint(
        0, 256, (num_bytes,), generator=torch.Generator().manual_seed(num_bytes), dtype=torch.uint8
    )


def by_hand(run_B: Tensor) -> int:
    data = bytes(run_B.tolist())
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    total = sum((2 * number + 1) * word for number, word in enumerate(words)) % MODULUS
    return total - MODULUS if total >= MODULUS // 2 else total


def test_the_worked_example_of_the_docstring(sum_words: Callable) -> None:
    assert int(sum_words(torch.tensor([5, 0, 2]).view(torch.uint8))) == 15


@pytest.mark.parametrize("num_words", [0, 1, 2, 4095, 4096, 4097, 9000])
def test_the_sum_is_that_of_all_words_modulo_two_to_the_64(
    sum_words: Callable, num_words: int
) -> None:
    run_B = drawn(8 * num_words)
    total = sum_words(run_B)
    assert total.shape == ()
    assert total.dtype == torch.int64
    assert int(total) == by_hand(run_B)


@pytest.mark.parametrize("at", [0, 8 * 4095 + 7, 8 * 4096, 8 * 8999])
def test_one_changed_byte_and_two_exchanged_words_are_found(sum_words: Callable, at: int) -> None:
    run_B = drawn(8 * 9000)
    changed_B, exchanged_B = run_B.clone(), run_B.clone()
    changed_B[at] ^= 1
    word = at // 8
    words = exchanged_B.view(torch.int64)
    words[[word, word - 1]] = words[[word - 1, word]]
    assert len({int(sum_words(one)) for one in (run_B, changed_B, exchanged_B)}) == 3


def test_a_run_that_is_not_of_whole_words_in_a_row_is_refused(sum_words: Callable) -> None:
    run_B = drawn(80)
    with pytest.raises(ValueError, match="a multiple of 8"):
        sum_words(run_B[:-1])
    with pytest.raises(ValueError, match="give uint8"):
        sum_words(run_B.view(torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        sum_words(run_B[::2])
    with pytest.raises(ValueError, match="begin at a multiple"):
        sum_words(run_B[1:73])
