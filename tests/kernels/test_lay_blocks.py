"""`lay_blocks` gives every row a place in a block of its expert, and nothing else one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_moelb.kernels.lay_blocks.ref import BLOCKS

NUMBERS = {
    "none": [0, 0, 0],
    "one row": [0, 1, 0],
    "one expert": [40],
    "full": [40, 40, 40],
    "mixed": [7, 0, 40, 8, 1, 0, 39],
    "many experts": [5] * 128,
}


@pytest.fixture
def lay_blocks(load_op: Callable) -> Callable:
    return load_op("lay_blocks")


def test_the_worked_example_of_the_docstring(lay_blocks: Callable) -> None:
    blocks = lay_blocks(torch.tensor([9, 1], dtype=torch.int32), num_rows=32, room=16, block=8)
    none = [32] * 8
    assert blocks.rows.tolist() == [*range(8), 8, *none[1:], 16, *none[1:], *none]
    assert blocks.experts.tolist() == [0, 0, 1, 1]
    assert blocks.used.tolist() == [24, 0]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("room", [0, 40])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_each_row_is_once_in_a_block_of_its_expert_in_order(
    lay_blocks: Callable, numbers: list[int], room: int, block: int
) -> None:
    spare = 0 if room else 13
    num_rows = len(numbers) * room if room else sum(numbers) + spare
    given = torch.tensor([99, *numbers], dtype=torch.int32)[1:]  # at any address
    blocks = lay_blocks(given, num_rows=num_rows, room=room, block=block)
    assert {x.dtype for x in (blocks.rows, blocks.experts, blocks.used)} == {torch.int32}
    begins = [at * room if room else sum(numbers[:at]) for at in range(len(numbers))]
    rows_of = [
        list(range(begin, begin + count)) for begin, count in zip(begins, numbers, strict=True)
    ]
    num_padded, num_inactive = blocks.used.tolist()
    assert num_inactive == 0
    assert num_padded == sum(-(-count // block) * block for count in numbers)
    assert len(blocks.rows) == block * len(blocks.experts)
    assert num_padded <= len(blocks.rows)
    experts = blocks.experts[: num_padded // block].tolist()
    assert experts == sorted(experts)
    found: list[list[int]] = [[] for _ in numbers]
    for expert, rows in zip(experts, blocks.rows.view(-1, block).tolist(), strict=False):
        assert rows[0] < num_rows, "a block without rows"
        found[expert] += [row for row in rows if row != num_rows]
    assert found == rows_of


def test_what_does_not_fit_is_refused(lay_blocks: Callable) -> None:
    numbers = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="Marlin takes 8, 16"):
        lay_blocks(numbers, num_rows=12, room=4, block=24)
    with pytest.raises(ValueError, match="room for 4"):
        lay_blocks(numbers, num_rows=13, room=4, block=8)
    with pytest.raises(ValueError, match="one int32 an expert"):
        lay_blocks(numbers.long(), num_rows=12, room=4, block=8)
    with pytest.raises(ValueError, match="one int32 an expert"):
        lay_blocks(numbers[:0], num_rows=0, room=0, block=8)
