"""`join_rows` puts the rows of two groups of experts behind each other, each in its expert's place.

Shape letters: M rows of room, H features.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def join_rows(load_op: Callable) -> Callable:
    return load_op("join_rows")


def make_rows(num_first: int, num_second: int, max_rows: int, width: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(num_first)
    shape = (num_first + num_second, max_rows, width)
    both = torch.randn(shape, generator=drawn).bfloat16()
    return both[:num_first].clone(), both[num_first:].clone()


def test_the_worked_example_of_the_docstring(join_rows: Callable) -> None:
    first = torch.tensor([[[1.0], [2.0], [9.0]]])
    second = torch.tensor([[[5.0], [9.0], [9.0]]])
    out = join_rows(first, second, torch.tensor([2, 1], dtype=torch.int32))
    assert out.shape == (2, 3, 1)
    assert out[0, :2, 0].tolist() == [1, 2]
    assert out[1, 0, 0].item() == 5


@pytest.mark.parametrize("width", [128, 384, 2048, 2176])
@pytest.mark.parametrize(
    ("num_first", "num_rows"),
    [
        (2, [0, 0, 0, 0, 0]),
        (2, [1, 0, 0, 1, 0]),
        (4, [12, 12, 12, 12, 12]),
        (1, [0, 12, 9, 1, 3]),
        (3, [5, 12, 8, 0, 0]),
        (0, [3, 1, 12]),
        (3, [3, 1, 12]),
    ],
    ids=str,
)
def test_every_expert_keeps_its_rows_and_its_place(
    join_rows: Callable, num_first: int, num_rows: list[int], width: int
) -> None:
    first, second = make_rows(num_first, len(num_rows) - num_first, 12, width)
    out = join_rows(first, second, torch.tensor(num_rows, dtype=torch.int32))
    expected = torch.cat([first, second])
    assert out.shape == expected.shape
    assert out.is_contiguous()
    for expert, count in enumerate(num_rows):
        assert torch.equal(out[expert, :count], expected[expert, :count]), expert


def test_numbers_may_lie_at_any_address(join_rows: Callable) -> None:
    numbers = torch.tensor([7, 2, 3, 1], dtype=torch.int32)[1:]
    first, second = make_rows(1, 2, 4, 128)
    out = join_rows(first, second, numbers)
    assert torch.equal(out[1, :3], second[0, :3])


def test_what_does_not_belong_together_is_refused(join_rows: Callable) -> None:
    first, second = make_rows(1, 2, 4, 128)
    numbers = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="only their numbers of experts"):
        join_rows(first, second[:, :3].contiguous(), numbers)
    with pytest.raises(ValueError, match="only their numbers of experts"):
        join_rows(first, second.float(), numbers)
    with pytest.raises(ValueError, match="one int32 an expert"):
        join_rows(first, second, numbers[:2])
    with pytest.raises(ValueError, match="one int32 an expert"):
        join_rows(first, second, numbers.long())
    with pytest.raises(ValueError, match="contiguous"):
        join_rows(first, second.mT.contiguous().mT, numbers)
