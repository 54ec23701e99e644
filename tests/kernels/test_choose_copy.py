"""`choose_copy` sends each row to the copy whose turn it is, and never to another expert's.

Shape letters: T tokens, K top-k, E experts, C most copies, B bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def choose_copy(load_op: Callable) -> Callable:
    return load_op("choose_copy")


def tables(*copies: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, copies))
    copies_EC = torch.tensor([ids + [-1] * (width - len(ids)) for ids in copies])
    bounds_EB = torch.zeros(len(copies), 6, dtype=torch.int32)
    return copies_EC.int(), torch.tensor([len(ids) for ids in copies]).int(), bounds_EB


def loop(ids_TK: Tensor, copies: tuple[list[int], ...], shift: int) -> list[list[int]]:
    return [
        [copies[i][(t + shift) % len(copies[i])] if 0 <= i < len(copies) else -1 for i in ids]
        for t, ids in enumerate(ids_TK.tolist())
    ]


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(0, [[0, 1], [1, 5], [0, -1]]), (1, [[5, 1], [1, 0], [5, -1]])],
)
def test_the_worked_example_of_the_docstring(
    choose_copy: Callable, shift: int, expected: list[list[int]]
) -> None:
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, -1]])
    assert choose_copy(ids_TK, *tables([0, 5], [1]), shift=shift).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("num_tokens", "topk"), [(0, 4), (1, 8), (7, 1), (700, 3)])
def test_every_row_gets_the_copy_whose_turn_it_is(
    choose_copy: Callable, dtype: torch.dtype, num_tokens: int, topk: int
) -> None:
    copies = ([3], [9, 1, 4], [0, 7], [2, 8, 5, 6])
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.randint(-2, 6, (num_tokens, topk), generator=generator).to(dtype)
    for shift in (0, 1, 5):
        out_TK = choose_copy(ids_TK, *tables(*copies), shift=shift)
        assert out_TK.dtype == dtype
        assert out_TK.tolist() == loop(ids_TK, copies, shift)


def test_strided_ids_are_read_where_they_lie(choose_copy: Callable) -> None:
    copies = ([0, 4], [1], [2], [3, 5])
    whole = torch.randint(0, 4, (50, 6), generator=torch.Generator().manual_seed(3))
    for ids_TK in (whole[:, :4], whole[:, ::2], whole.T):
        out_TK = choose_copy(ids_TK, *tables(*copies), shift=2)
        assert out_TK.tolist() == loop(ids_TK, copies, 2)
        assert out_TK.is_contiguous()


def test_rows_of_a_run_of_tokens_are_split_evenly(choose_copy: Callable) -> None:
    ids_TK = torch.zeros(1001, 1, dtype=torch.int64)
    out_TK = choose_copy(ids_TK, *tables([0, 1, 2]), shift=1)
    assert out_TK.flatten().bincount().tolist() == [333, 334, 334]


def shared(*shares: list[int]) -> Tensor:
    bounds_EB = torch.full((len(shares), 6), 64, dtype=torch.int32)
    for expert, own in enumerate(shares):
        assert sum(own) == 64
        ends = torch.tensor(own).cumsum(0)[:-1]
        bounds_EB[expert, : len(ends)] = ends
    return bounds_EB


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("num_tokens", [1, 64, 640])
def test_any_64_tokens_that_follow_one_another_are_split_by_shares_exactly(
    choose_copy: Callable, num_tokens: int, shift: int, dtype: torch.dtype
) -> None:
    copies = ([0, 4, 5], [1, 7], [2], [3, 6])
    copies_EC, num_copies_E, bounds_EB = tables(*copies)
    shares = ([9, 54, 1], [63, 1])
    bounds_EB[:2] = shared(*shares)
    ids_TK = torch.tensor([[0, 1, 2, 3, -1]]).expand(num_tokens, 5).to(dtype)
    out_TK = choose_copy(ids_TK, copies_EC, num_copies_E, bounds_EB, shift=shift)
    assert (out_TK[:, 4] == -1).all()
    assert out_TK[:, 2:4].tolist() == [r[2:4] for r in loop(ids_TK, copies, shift)], "even as ever"
    for expert, own in enumerate(shares):
        chosen_T = out_TK[:, expert].tolist()
        for t, copy in enumerate(chosen_T):
            position = (t + shift) * 39 % 64
            turn = sum(position >= sum(own[: n + 1]) for n in range(len(own) - 1))
            assert copy == copies[expert][turn]
        for begin in range(0, num_tokens - 63, 37):
            run = chosen_T[begin : begin + 64]
            assert [run.count(copy) for copy in copies[expert]] == own


def test_shorter_runs_stay_within_two_rows_of_their_share_and_a_big_batch_too(
    choose_copy: Callable,
) -> None:
    copies_EC, num_copies_E, _ = tables([0, 1])
    for share in (1, 20, 32, 50, 63):
        bounds_EB = shared([share, 64 - share])
        ids_T1 = torch.zeros(16384, 1, dtype=torch.int64)
        first_T = choose_copy(ids_T1, copies_EC, num_copies_E, bounds_EB, shift=2)[:, 0] == 0
        assert int(first_T.sum()) == 16384 * share // 64
        for length in (3, 10, 31):
            runs = first_T.long().unfold(0, length, 1).sum(dim=1)
            assert float((runs - length * share / 64).abs().max()) <= 2


def test_what_does_not_belong_together_is_refused(choose_copy: Callable) -> None:
    copies_EC, num_copies_E, bounds_EB = tables([0], [1])
    ids_TK = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="one row a token"):
        choose_copy(ids_TK[0], copies_EC, num_copies_E, bounds_EB, shift=0)
    with pytest.raises(ValueError, match="one number an expert"):
        choose_copy(ids_TK, copies_EC, num_copies_E[:1], bounds_EB, shift=0)
    with pytest.raises(ValueError, match="shift -1"):
        choose_copy(ids_TK, copies_EC, num_copies_E, bounds_EB, shift=-1)
