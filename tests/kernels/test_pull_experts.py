"""`pull_experts` fills the slots in use with the right experts, byte for byte, and no others.

Shape letters: P parts of an expert's weights, R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

SHAPES_P = ((180, 400), (96, 180))  # in bf16 144,000 bytes, two chunks and a bit, and 34,560
SMALL, KEPT = SHAPES_P[1], 9.0


@pytest.fixture
def pull_experts(load_op: Callable) -> Callable:
    return load_op("pull_experts")


def make_experts(
    num_ranks: int,
    num_local: int,
    shapes_P: Sequence[tuple[int, int]] = SHAPES_P,
    dtype: torch.dtype = torch.bfloat16,
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        list(torch.randn((num_ranks, num_local, *shape), generator=generator).to(dtype).unbind(0))
        for shape in shapes_P
    ]


def make_slots(num_slots: int, experts_PR: list[list[Tensor]]) -> list[Tensor]:
    return [
        torch.full((num_slots, *of_part[0].shape[1:]), KEPT).to(of_part[0].dtype)
        for of_part in experts_PR
    ]


def slots(*ranks: list[int]) -> Tensor:
    return torch.tensor(ranks, dtype=torch.int32)


def test_the_worked_example_of_the_docstring(pull_experts: Callable) -> None:
    experts_PR = make_experts(2, 2)
    staged_P = make_slots(3, experts_PR)
    pull_experts(experts_PR, slots([-1] * 3, [1, -1, 0]), staged_P, my_rank=1, num_programs=2)
    for experts_R, staged in zip(experts_PR, staged_P, strict=True):
        assert torch.equal(staged[0], experts_R[0][1])
        assert (staged[1] == KEPT).all()
        assert torch.equal(staged[2], experts_R[0][0])


@pytest.mark.parametrize("num_programs", [1, 3, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes_P", [SHAPES_P, SHAPES_P[::-1], SHAPES_P[:1]])
def test_slots_in_use_are_filled_and_others_left(
    pull_experts: Callable,
    num_programs: int,
    dtype: torch.dtype,
    shapes_P: tuple[tuple[int, int], ...],
) -> None:
    experts_PR = make_experts(3, 2, shapes_P, dtype)
    slots_RS = slots([5, -1, 2], [-1, -1, -1], [-1, 0, 3])
    for rank in range(3):
        staged_P = make_slots(3, experts_PR)
        pull_experts(experts_PR, slots_RS, staged_P, my_rank=rank, num_programs=num_programs)
        for experts_R, staged in zip(experts_PR, staged_P, strict=True):
            for slot, expert in enumerate(slots_RS[rank].tolist()):
                kept = torch.full_like(staged[slot], KEPT)
                expected = kept if expert < 0 else experts_R[expert // 2][expert % 2]
                assert torch.equal(staged[slot], expected)


def test_slots_behind_the_own_experts_leave_those_alone(pull_experts: Callable) -> None:
    experts_PR = make_experts(2, 2)
    whole_P = [torch.cat([of_part[1], torch.zeros_like(of_part[1])]) for of_part in experts_PR]
    for experts_R, whole in zip(experts_PR, whole_P, strict=True):
        experts_R[1] = whole[:2]
    expected_P = [
        torch.cat([own, other]) for other, own in (map(torch.clone, pair) for pair in experts_PR)
    ]
    staged_P = [whole[2:] for whole in whole_P]
    pull_experts(experts_PR, slots([-1, -1], [0, 1]), staged_P, my_rank=1)
    for whole, expected in zip(whole_P, expected_P, strict=True):
        assert torch.equal(whole, expected)


def test_bytes_are_copied_whatever_they_mean(pull_experts: Callable) -> None:
    words = torch.randint(-128, 128, (2, 1, 48), generator=torch.Generator().manual_seed(1))
    experts_PR = [list(words.to(torch.int8).unbind(0))]
    staged = torch.zeros(1, 48, dtype=torch.int8)
    pull_experts(experts_PR, slots([-1], [0]), [staged], my_rank=1)
    assert torch.equal(staged[0], experts_PR[0][0][0])


def test_no_slots_copy_nothing(pull_experts: Callable) -> None:
    experts_PR = make_experts(2, 1)
    pull_experts(experts_PR, torch.zeros(2, 0).int(), make_slots(0, experts_PR), my_rank=0)


def test_what_does_not_belong_together_is_refused(pull_experts: Callable) -> None:
    experts_PR = make_experts(2, 2, [SMALL])
    (staged,) = make_slots(1, experts_PR)
    plan = slots([-1], [0])
    with pytest.raises(ValueError, match="slots of 2 ranks, experts of 1"):
        pull_experts([experts_PR[0][:1]], plan, [staged], my_rank=0)
    with pytest.raises(ValueError, match="my_rank 2 is not one of 2 ranks"):
        pull_experts(experts_PR, plan, [staged], my_rank=2)
    with pytest.raises(ValueError, match="do not hold 1 experts"):
        pull_experts(experts_PR, plan, [staged[:, :5].contiguous()], my_rank=0)
    with pytest.raises(ValueError, match="must be contiguous"):
        pull_experts(experts_PR, plan, [staged.transpose(1, 2)], my_rank=0)
    with pytest.raises(ValueError, match=r"slots torch\.float32"):
        pull_experts(experts_PR, plan, [staged.float()], my_rank=0)
    with pytest.raises(ValueError, match="at least 1 must copy"):
        pull_experts(experts_PR, plan, [staged], my_rank=0, num_programs=0)
    with pytest.raises(ValueError, match="experts of 1 parts, slots of 2"):
        pull_experts(experts_PR, plan, [staged, staged], my_rank=0)
    with pytest.raises(ValueError, match="experts of 3 parts, slots of 3"):
        pull_experts(experts_PR * 3, plan, [staged] * 3, my_rank=0)
    few_R = [own[:1].contiguous() for own in experts_PR[0]]
    with pytest.raises(ValueError, match="different numbers of experts"):
        pull_experts([*experts_PR, few_R], plan, [staged, staged], my_rank=0)
    odd_R = [torch.zeros(1, 3), torch.zeros(1, 3)]
    with pytest.raises(ValueError, match="an expert of 12 bytes is no multiple of 16"):
        pull_experts([odd_R], plan, [torch.zeros(1, 3)], my_rank=0)
