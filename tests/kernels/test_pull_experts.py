"""`pull_experts` fills the slots in use with the right experts, byte for byte, and no others.

Shape letters: R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SHAPE = (96, 180)  # 34,560 bytes in bf16: a chunk and a bit


@pytest.fixture
def pull_experts(load_op: Callable) -> Callable:
    return load_op("pull_experts")


def make_experts(num_ranks: int, num_local: int, dtype: torch.dtype = torch.bfloat16) -> list:
    generator = torch.Generator().manual_seed(7)
    size = (num_ranks, num_local, *SHAPE)
    return list(torch.randn(size, generator=generator).to(dtype).unbind(0))


def slots(*ranks: list[int]) -> Tensor:
    return torch.tensor(ranks, dtype=torch.int32)


def test_the_worked_example_of_the_docstring(pull_experts: Callable) -> None:
    experts = make_experts(2, 2)
    staged = torch.zeros(3, *SHAPE, dtype=torch.bfloat16)
    pull_experts(experts, slots([-1] * 3, [1, -1, 0]), staged, my_rank=1, num_programs=2)
    assert torch.equal(staged[0], experts[0][1])
    assert not staged[1].any()
    assert torch.equal(staged[2], experts[0][0])


@pytest.mark.parametrize("num_programs", [1, 3, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slots_in_use_are_filled_and_others_left(
    pull_experts: Callable, num_programs: int, dtype: torch.dtype
) -> None:
    experts = make_experts(3, 2, dtype)
    slots_RS = slots([5, -1, 2], [-1, -1, -1], [-1, 0, 3])
    for rank in range(3):
        staged = torch.full((3, *SHAPE), 9.0, dtype=dtype)
        pull_experts(experts, slots_RS, staged, my_rank=rank, num_programs=num_programs)
        for slot, expert in enumerate(slots_RS[rank].tolist()):
            kept = torch.full(SHAPE, 9.0, dtype=dtype)
            expected = kept if expert < 0 else experts[expert // 2][expert % 2]
            assert torch.equal(staged[slot], expected)


def test_bytes_are_copied_whatever_they_mean(pull_experts: Callable) -> None:
    words = torch.randint(-128, 128, (2, 1, 48), generator=torch.Generator().manual_seed(1))
    experts = list(words.to(torch.int8).unbind(0))
    staged = torch.zeros(1, 48, dtype=torch.int8)
    pull_experts(experts, slots([-1], [0]), staged, my_rank=1)
    assert torch.equal(staged[0], experts[0][0])


def test_no_slots_copy_nothing(pull_experts: Callable) -> None:
    experts = make_experts(2, 1)
    pull_experts(experts, torch.zeros(2, 0).int(), torch.zeros(0, *SHAPE).bfloat16(), my_rank=0)


def test_what_does_not_belong_together_is_refused(pull_experts: Callable) -> None:
    experts = make_experts(2, 2)
    staged = torch.zeros(1, *SHAPE, dtype=torch.bfloat16)
    plan = slots([-1], [0])
    with pytest.raises(ValueError, match="slots of 2 ranks, experts of 1"):
        pull_experts(experts[:1], plan, staged, my_rank=0)
    with pytest.raises(ValueError, match="my_rank 2 is not one of 2 ranks"):
        pull_experts(experts, plan, staged, my_rank=2)
    with pytest.raises(ValueError, match="do not hold 1 experts"):
        pull_experts(experts, plan, staged[:, :5].contiguous(), my_rank=0)
    with pytest.raises(ValueError, match="must be contiguous"):
        pull_experts(experts, plan, staged.transpose(1, 2), my_rank=0)
    with pytest.raises(ValueError, match=r"slots torch\.float32"):
        pull_experts(experts, plan, staged.float(), my_rank=0)
    with pytest.raises(ValueError, match="at least 1 must copy"):
        pull_experts(experts, plan, staged, my_rank=0, num_programs=0)
    odd = [torch.zeros(1, 3), torch.zeros(1, 3)]
    with pytest.raises(ValueError, match="an expert of 12 bytes is no multiple of 16"):
        pull_experts(odd, plan, torch.zeros(1, 3), my_rank=0)
