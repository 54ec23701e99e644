"""`reroute` meets the quotas of a plan exactly, row by row, and equals a plain loop.

Shape letters: T tokens, K top-k, R ranks, W row width, E experts, S slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_moelb.controller.place_replicas import deal_rows
from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.place_replicas import place_replicas


@pytest.fixture
def reroute(load_op: Callable) -> Callable:
    return load_op("reroute")


def route(num_tokens: int, topk: int, num_experts: int, seed: int, skew: float = 2.0) -> Tensor:
    """Distinct ids of popular experts first, with padding tokens and single missing entries."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(num_tokens, num_experts))
    popularity = -skew * np.arange(num_experts) / num_experts * 4
    ids_TK = np.argsort(-(noise + popularity), axis=1, kind="stable")[:, :topk]
    ids_TK[rng.random(ids_TK.shape) < 0.05] = -1
    ids_TK[rng.random(num_tokens) < 0.1] = -1
    return torch.from_numpy(ids_TK)


def count_rows(ids_of_ranks: list[Tensor], num_experts: int) -> Tensor:
    width = layout.row_width(num_experts, with_histogram=False)
    rows_RW = torch.full((len(ids_of_ranks), width), 3, dtype=torch.int32)
    counts_RE5 = layout.counts_of(rows_RW, num_experts)
    for rank, ids_TK in enumerate(ids_of_ranks):
        valid = ids_TK[(ids_TK >= 0) & (ids_TK < num_experts)].long()
        rows_E = torch.bincount(valid, minlength=num_experts)
        counts_RE5[rank, :, layout.C_TEXT_ROWS] = (rows_E - rows_E // 4).int()
        counts_RE5[rank, :, layout.C_VISION_ROWS] = (rows_E // 4).int()
    return rows_RW


def loop_reroute(
    ids_TK: Tensor, rows_RW: Tensor, slots_RS: Tensor, quota_ER: Tensor, my_rank: int
) -> list[list[int]]:
    """What reroute promises, one row after another."""
    num_experts, num_ranks = quota_ER.shape
    size, num_slots = num_experts // num_ranks, slots_RS.shape[1]
    counts = layout.counts_of(rows_RW, num_experts).numpy()
    rows_RE = counts[..., layout.C_TEXT_ROWS] + counts[..., layout.C_VISION_ROWS]
    left_ER = deal_rows(rows_RE.astype(np.int64), quota_ER.numpy().astype(np.int64))[my_rank]
    slots = slots_RS.tolist()
    physical = []
    for ids in ids_TK.tolist():
        physical.append([])
        for expert in ids:
            if not 0 <= expert < num_experts:
                physical[-1].append(-1)
                continue
            rank = int((left_ER[expert] > 0).argmax())
            left_ER[expert, rank] -= 1
            is_home = rank == expert // size
            place = expert % size if is_home else size + slots[rank].index(expert)
            physical[-1].append(rank * (size + num_slots) + place)
    assert (left_ER == 0).all()
    return physical


def assert_rerouted(
    reroute: Callable, ids_of_ranks: list[Tensor], num_experts: int, num_slots: int
) -> None:
    rows_RW = count_rows(ids_of_ranks, num_experts)
    slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=num_experts, num_slots=num_slots)
    for rank in {0, len(ids_of_ranks) // 2, len(ids_of_ranks) - 1}:
        ids_TK = ids_of_ranks[rank]
        out_TK = reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=rank)
        assert out_TK.dtype == ids_TK.dtype
        assert out_TK.shape == ids_TK.shape
        assert out_TK.tolist() == loop_reroute(ids_TK, rows_RW, slots_RS, quota_ER, rank)


def logical(physical: int, slots: list[list[int]], num_local: int) -> int:
    """The expert behind a physical id."""
    rank, place = divmod(physical, num_local + len(slots[0]))
    return rank * num_local + place if place < num_local else slots[rank][place - num_local]


def test_the_worked_example_of_the_docstring(reroute: Callable) -> None:
    ids = [torch.tensor([[0], [1], [0], [0]]), torch.tensor([[0]])]
    slots_RS = torch.tensor([[-1], [0]], dtype=torch.int32)
    quota_ER = torch.tensor([[2, 2], [1, 0], [0, 0], [0, 0]], dtype=torch.int32)
    rows_RW = count_rows(ids, 4)
    out_TK = reroute(ids[0], rows_RW, slots_RS, quota_ER, my_rank=0)
    assert out_TK.tolist() == [[0], [1], [0], [5]]
    assert reroute(ids[1], rows_RW, slots_RS, quota_ER, my_rank=1).tolist() == [[5]]


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "topk", "num_slots"),
    [(4, 128, 8, 8), (2, 8, 2, 1), (3, 12, 3, 2), (5, 40, 6, 4), (1, 16, 4, 2)],
)
def test_it_equals_a_loop_row_by_row(
    reroute: Callable, num_ranks: int, num_experts: int, topk: int, num_slots: int
) -> None:
    sizes = [300, 0, 1, 129, 64][:num_ranks]
    ids = [route(n, topk, num_experts, seed) for seed, n in enumerate(sizes)]
    assert_rerouted(reroute, ids, num_experts, num_slots)


def test_16_ranks_and_256_experts_with_32_bit_ids(reroute: Callable) -> None:
    ids = [route(70, 8, 256, seed, skew=3.0).int() for seed in range(16)]
    assert_rerouted(reroute, ids, 256, 4)


@pytest.mark.parametrize("has_copy", [True, False])
@pytest.mark.parametrize("wanted", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", [torch.int32, torch.int64])
def test_the_ids_have_the_type_that_is_asked_for(
    reroute: Callable, given: torch.dtype, wanted: torch.dtype, *, has_copy: bool
) -> None:
    ids_TK = torch.tensor([[0], [1], [0], [0]])
    rows_RW = count_rows([ids_TK, torch.tensor([[0]])], 4)
    slots_RS = torch.tensor([[-1], [0 if has_copy else -1]], dtype=torch.int32)
    quota_ER = torch.tensor(
        [[2, 2] if has_copy else [4, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.int32
    )
    out_TK = reroute(ids_TK.to(given), rows_RW, slots_RS, quota_ER, my_rank=0, dtype=wanted)
    assert out_TK.dtype == wanted
    assert out_TK.flatten().tolist() == [0, 1, 0, 5 if has_copy else 0]


def test_many_tokens_span_many_tiles(reroute: Callable) -> None:
    ids = [route(9000, 2, 16, seed=0), route(40, 2, 16, seed=1)]
    assert_rerouted(reroute, ids, 16, 2)


def test_each_row_meets_its_expert_once_and_the_quotas_are_met(reroute: Callable) -> None:
    num_experts, num_ranks = 32, 4
    ids = [route(n, 4, num_experts, seed) for seed, n in enumerate((200, 50, 0, 333))]
    rows_RW = count_rows(ids, num_experts)
    slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=num_experts, num_slots=3)
    slots, computed = slots_RS.tolist(), Counter()
    assert (slots_RS >= 0).any()
    for rank, ids_TK in enumerate(ids):
        out_TK = reroute(ids_TK, rows_RW, slots_RS, quota_ER, my_rank=rank)
        for before, after in zip(ids_TK.flatten().tolist(), out_TK.flatten().tolist(), strict=True):
            assert (before < 0) == (after < 0)
            if after >= 0:
                assert logical(after, slots, num_experts // num_ranks) == before
                computed[before, after // (num_experts // num_ranks + 3)] += 1
    quotas = {(e, r): int(quota_ER[e, r]) for e in range(num_experts) for r in range(num_ranks)}
    assert computed == Counter({key: rows for key, rows in quotas.items() if rows})


def test_rows_stay_at_a_source_that_has_a_copy(reroute: Callable) -> None:
    ids = [torch.zeros(10, 1, dtype=torch.int64) for _ in range(4)]
    rows_RW = count_rows(ids, 8)
    slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=8, num_slots=1)
    assert quota_ER[0].tolist() == [10] * 4
    for rank in range(4):
        out_TK = reroute(ids[rank], rows_RW, slots_RS, quota_ER, my_rank=rank)
        assert out_TK.unique().tolist() == [0 if rank == 0 else rank * 3 + 2]


def test_without_copies_ids_only_move_to_wider_ranks(reroute: Callable) -> None:
    ids = [torch.arange(8).view(4, 2), torch.arange(8).flip(0).view(4, 2)]
    rows_RW = count_rows(ids, 8)
    for num_slots, expected in ((0, list(range(8))), (3, [0, 1, 2, 3, 7, 8, 9, 10])):
        slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=8, num_slots=num_slots)
        out_TK = reroute(ids[0], rows_RW, slots_RS, quota_ER, my_rank=0)
        assert out_TK.flatten().tolist() == expected


@pytest.mark.parametrize("num_slots", [1, 200])
def test_a_plan_without_copies_sends_every_row_home_whatever_the_ids(
    reroute: Callable, num_slots: int
) -> None:
    """Few slots are looked through for a copy, of many a kernel takes the way with copies."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(-2, 18, (700, 5), generator=generator) for _ in range(8)]
    rows_RW = count_rows([one.where((one >= 0) & (one < 16), -1) for one in ids], 16)
    plan = place_replicas(rows_RW, num_experts=16, num_slots=num_slots, min_rows=100_000)
    assert (plan[0] == -1).all()
    for rank in (0, 5):
        out_TK = reroute(ids[rank], rows_RW, *plan[:2], my_rank=rank)
        home = ids[rank] // 2 * (2 + num_slots) + ids[rank] % 2
        is_expert = (ids[rank] >= 0) & (ids[rank] < 16)
        assert torch.equal(out_TK, home.where(is_expert, -1))


def test_an_id_that_stands_twice_in_a_token_is_two_rows(reroute: Callable) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(-1, 4, (90, 6), generator=generator) for _ in range(2)]
    assert_rerouted(reroute, ids, 4, 1)


def test_no_tokens_and_one_token(reroute: Callable) -> None:
    ids = [torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[0, 1]])]
    assert_rerouted(reroute, ids, 4, 1)


def test_ids_outside_the_experts_become_minus_1(reroute: Callable) -> None:
    ids = [torch.tensor([[0, 4], [-7, 3]]), torch.tensor([[1, 1000]])]
    assert_rerouted(reroute, ids, 4, 1)


def test_strided_ids(reroute: Callable) -> None:
    wide = route(100, 8, 16, seed=3)
    ids = [wide[:, 2:5], wide.t().contiguous().t()[:, :3]]
    assert_rerouted(reroute, ids, 16, 2)


def test_shapes_that_do_not_belong_together_are_refused(reroute: Callable) -> None:
    ids = [torch.tensor([[0, 1]]), torch.tensor([[0, 1]])]
    rows_RW = count_rows(ids, 4)
    slots_RS, quota_ER, _ = place_replicas(rows_RW, num_experts=4, num_slots=1)
    with pytest.raises(ValueError, match="my_rank 2 is not one of 2 ranks"):
        reroute(ids[0], rows_RW, slots_RS, quota_ER, my_rank=2)
    with pytest.raises(ValueError, match="they must be of one plan"):
        reroute(ids[0], rows_RW[:1], slots_RS, quota_ER, my_rank=0)
    with pytest.raises(ValueError, match="do not hold 4 experts"):
        reroute(ids[0], rows_RW[:, :20], slots_RS, quota_ER, my_rank=0)
    with pytest.raises(ValueError, match="give one row a token"):
        reroute(ids[0][0], rows_RW, slots_RS, quota_ER, my_rank=0)
