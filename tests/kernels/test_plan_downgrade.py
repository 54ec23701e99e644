"""`plan_downgrade` on tensors and in plain integers is one rule, and the rule is the stated one.

Shape letters: R ranks, W row width, E experts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sglang_moelb.controller.plan_downgrade import plan_downgrade as plan_in_integers
from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.types import Form

REALLB = {"capacity_factor": 1.0, "vision_share": 0.7}


@pytest.fixture
def plan_downgrade(load_op: Callable) -> Callable:
    """The op, held equal to its twin in plain integers at every call."""
    plan_on_tensors = load_op("plan_downgrade")

    def plan(counts_RW: Tensor, num_experts: int, **options: float) -> list[int]:
        low_E = plan_on_tensors(counts_RW, num_experts=num_experts, **options)
        assert low_E.dtype == torch.int32
        counts_E5 = layout.counts_of(counts_RW, num_experts).long().sum(0)
        vision_E = counts_E5[:, layout.C_VISION_ROWS]
        rows_E = counts_E5[:, layout.C_TEXT_ROWS] + vision_E
        twin_E = plan_in_integers(
            rows_E.tolist(),
            vision_E.tolist(),
            counts_E5[:, layout.C_REFUSED_ROWS].tolist(),
            num_ranks=len(counts_RW),
            **options,
        )
        assert low_E.tolist() == twin_E
        return twin_E

    return plan


def make_counts(
    text_RE: Tensor,
    vision_RE: Tensor,
    refused_RE: Tensor | int = 0,
    *,
    with_histogram: bool = False,
) -> Tensor:
    num_ranks, num_experts = text_RE.shape
    width = layout.row_width(num_experts, with_histogram=with_histogram)
    counts_RW = torch.full((num_ranks, width), 12345, dtype=torch.int32)
    counts_RE5 = layout.counts_of(counts_RW, num_experts)
    counts_RE5[..., layout.C_TEXT_ROWS] = text_RE.int()
    counts_RE5[..., layout.C_VISION_ROWS] = vision_RE.int()
    counts_RE5[..., layout.C_REFUSED_ROWS] = refused_RE
    return counts_RW


def counts_of_one(
    rows_E: Sequence[int],
    vision_E: Sequence[int],
    num_ranks: int,
    refused_E: Sequence[int] | None = None,
) -> Tensor:
    """All rows come from the last rank; the others have none."""
    text_RE = torch.zeros(num_ranks, len(rows_E), dtype=torch.int64)
    vision_RE = text_RE.clone()
    vision_RE[-1] = torch.tensor(vision_E)
    text_RE[-1] = torch.tensor(rows_E) - vision_RE[-1]
    refused_RE = torch.zeros_like(text_RE)
    refused_RE[-1] = torch.tensor(refused_E or [0] * len(rows_E))
    return make_counts(text_RE, vision_RE, refused_RE)


def random_counts(pick: random.Random, num_ranks: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(pick.randrange(1 << 30))
    shape = (num_ranks, num_experts)
    text_RE = torch.randint(0, pick.choice([1, 3, 200]), shape, generator=generator)
    vision_RE = torch.randint(0, pick.choice([2, 5, 400]), shape, generator=generator)
    text_RE[:, : pick.randrange(num_experts)] *= pick.choice([0, 1, 4])
    refused_RE = torch.randint(0, 12, shape, generator=generator) == 0
    return make_counts(text_RE, vision_RE, (text_RE + vision_RE) * refused_RE * pick.choice([0, 1]))


@pytest.mark.parametrize(
    ("form", "expected"),
    [(Form.RANK, [1, 1, 0, 0]), (Form.EXPERTS, [0, 1, 0, 0]), (Form.FEWEST, [0, 1, 0, 0])],
)
def test_the_worked_example_of_the_docstring(
    plan_downgrade: Callable, form: Form, expected: list[int]
) -> None:
    counts_RW = counts_of_one([40, 60, 20, 0], [10, 50, 20, 0], num_ranks=2)
    options = {"capacity_factor": 1.0, "vision_share": 0.5, "low_cost": 0.5}
    assert plan_downgrade(counts_RW, 4, form=form, **options) == expected
    counts_RW = counts_of_one([40, 60, 20, 0], [10, 50, 20, 0], 2, refused_E=[0, 1, 0, 0])
    assert plan_downgrade(counts_RW, 4, form=form, **options) == [0] * 4


@pytest.mark.parametrize("form", Form)
def test_tensors_and_plain_integers_decide_alike_and_forms_only_spare(
    plan_downgrade: Callable, form: Form
) -> None:
    pick = random.Random(int(form))
    num_low = num_refused = 0
    for _ in range(15):
        num_ranks = pick.choice([1, 2, 3, 4])
        num_experts = num_ranks * pick.choice([1, 2, 5, 8])
        counts_RW = random_counts(pick, num_ranks, num_experts)
        options = {
            "capacity_factor": pick.choice([0.0, 0.8, 1.0, 1.1]),
            "vision_share": pick.choice([0.0, 0.4, 0.5, 0.7]),
            "low_cost": pick.choice([0.0, 0.5, 0.66, 1.0]),
        }
        low_E = plan_downgrade(counts_RW, num_experts, form=form, **options)
        counts_RE5 = layout.counts_of(counts_RW, num_experts)
        refused_E = counts_RE5[..., layout.C_REFUSED_ROWS].sum(0).tolist()
        counts_RE5[..., layout.C_REFUSED_ROWS] = 0
        whole_E = plan_downgrade(counts_RW, num_experts, form=Form.RANK, **options)
        for low, whole, refused in zip(low_E, whole_E, refused_E, strict=True):
            assert low <= whole
            assert not (low and refused)
        num_refused += sum(refused_E)
        num_low += sum(low_E)
    assert min(num_low, num_refused) > 0


def test_64_ranks_and_256_experts(plan_downgrade: Callable) -> None:
    generator = torch.Generator().manual_seed(5)
    text_RE, vision_RE = (torch.randint(n, (64, 256), generator=generator) for n in (4, 8))
    counts_RW = make_counts(text_RE, vision_RE)
    options = {"form": Form.FEWEST, "capacity_factor": 1.0, "vision_share": 0.7}
    assert 0 < sum(plan_downgrade(counts_RW, 256, **options)) < 256


@pytest.mark.parametrize("form", Form)
def test_a_load_or_share_exactly_at_its_threshold_lowers_nothing(
    plan_downgrade: Callable, form: Form
) -> None:
    options = {"form": form, "capacity_factor": 1.1, "vision_share": 0.7}
    at_capacity = counts_of_one([110, 90], [110, 0], num_ranks=2)
    assert plan_downgrade(at_capacity, 2, **options) == [0, 0]
    above = counts_of_one([1101, 899], [1101, 0], num_ranks=2)
    assert plan_downgrade(above, 2, **options) == [1, 0]
    at_share = counts_of_one([2000, 0], [1400, 0], num_ranks=2)
    assert plan_downgrade(at_share, 2, **options) == [0, 0]
    above = counts_of_one([2000, 0], [1401, 0], num_ranks=2)
    assert plan_downgrade(above, 2, **options) == [1, 0]


@pytest.mark.parametrize("form", Form)
def test_ranks_without_rows_are_left_alone(plan_downgrade: Callable, form: Form) -> None:
    nothing = counts_of_one([0] * 6, [0] * 6, num_ranks=3)
    low_E = plan_downgrade(nothing, 6, form=form, capacity_factor=0.0, vision_share=0.0)
    assert low_E == [0] * 6
    idle = counts_of_one([0, 0, 9, 9, 1, 1], [0, 0, 9, 9, 1, 1], num_ranks=3)
    low_E = plan_downgrade(idle, 6, form=form, capacity_factor=0.0, vision_share=0.0)
    assert low_E[:2] == [0, 0]
    assert low_E[2:4] == [1, 1]


def test_all_rows_on_one_expert_lower_it_and_only_reallb_lowers_its_neighbours(
    plan_downgrade: Callable,
) -> None:
    counts_RW = counts_of_one([0, 1000, 0, 0], [0, 900, 0, 0], num_ranks=2)
    assert plan_downgrade(counts_RW, 4, form=Form.RANK, **REALLB) == [1, 1, 0, 0]
    assert plan_downgrade(counts_RW, 4, form=Form.EXPERTS, **REALLB) == [0, 1, 0, 0]
    assert plan_downgrade(counts_RW, 4, form=Form.FEWEST, **REALLB) == [0, 1, 0, 0]


@pytest.mark.parametrize("form", Form)
def test_a_hot_rank_full_of_text_is_left_alone(plan_downgrade: Callable, form: Form) -> None:
    counts_RW = counts_of_one([500, 500, 10, 10], [300, 300, 10, 10], num_ranks=2)
    assert plan_downgrade(counts_RW, 4, form=form, **REALLB) == [0] * 4


def test_the_fewest_stop_where_the_predicted_time_is_the_mean(plan_downgrade: Callable) -> None:
    options = {"form": Form.FEWEST, "low_cost": 0.5, **REALLB}
    # Mean 200. Lowering 80 leaves 280 - 40 = 240, lowering 80 more exactly 200.
    counts_RW = counts_of_one([40, 80, 80, 80, 120, 0, 0, 0], [40, 80, 80, 80] + [0] * 4, 2)
    assert plan_downgrade(counts_RW, 8, **options) == [0, 1, 1, 0, 0, 0, 0, 0]
    # With one row less elsewhere the mean is lower, and the next of equals is lowered too.
    counts_RW = counts_of_one([40, 80, 80, 80, 119, 0, 0, 0], [40, 80, 80, 80] + [0] * 4, 2)
    assert plan_downgrade(counts_RW, 8, **options) == [0, 1, 1, 1, 0, 0, 0, 0]


def test_where_the_fewest_do_not_suffice_all_vision_experts_are_lowered(
    plan_downgrade: Callable,
) -> None:
    counts_RW = counts_of_one([900, 50, 60, 0, 10, 0, 0, 0], [900, 0, 60, 0] + [0] * 4, 2)
    low_E = plan_downgrade(counts_RW, 8, form=Form.FEWEST, low_cost=0.9, **REALLB)
    assert low_E == [1, 0, 1, 0, 0, 0, 0, 0]


def test_no_smaller_set_of_vision_experts_reaches_the_mean(plan_downgrade: Callable) -> None:
    pick = random.Random(3)
    options = {"form": Form.FEWEST, "low_cost": 0.5, **REALLB}
    num_between = 0
    for _ in range(15):
        vision_E = [pick.randrange(100) for _ in range(5)]
        rows_E = [rows + pick.choice([0, 0, rows]) for rows in vision_E] + [pick.randrange(60)] * 5
        counts_RW = counts_of_one(rows_E, vision_E + [0] * 5, num_ranks=2)
        num_low = sum(plan_downgrade(counts_RW, 10, **options))
        load, mean = sum(rows_E[:5]), sum(rows_E) / 2
        if not num_low:
            continue
        able = [r for r, v in zip(rows_E[:5], vision_E, strict=True) if v * 10 > 7 * max(r, 1)]
        reaching = [
            len(chosen)
            for size in range(len(able) + 1)
            for chosen in itertools.combinations(able, size)
            if load - 0.5 * sum(chosen) <= mean
        ]
        assert num_low == min(reaching, default=len(able))
        num_between += 0 < num_low < len(able)
    assert num_between > 0


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form.RANK, [0, 0, 0, 0, 1, 1, 1, 1]),
        (Form.EXPERTS, [0, 1, 0, 0, 1, 1, 0, 0]),
        (Form.FEWEST, [0, 1, 1, 0, 1, 0, 0, 0]),
    ],
)
def test_refused_rows_spare_the_rank_or_the_expert_that_computes_them_and_no_other(
    plan_downgrade: Callable, form: Form, expected: list[int]
) -> None:
    """Two equal hot ranks and an idle one; expert 0 has one refused row, and two take its place."""
    rows_E = [300, 200, 100, 20] * 2 + [0] * 4
    refused_E = [1] + [0] * 11
    options = {"form": form, "capacity_factor": 1.2, "vision_share": 0.7, "low_cost": 0.3}
    free = plan_downgrade(counts_of_one(rows_E, rows_E, 3), 12, **options)
    assert free[:4] == free[4:8]
    low_E = plan_downgrade(counts_of_one(rows_E, rows_E, 3, refused_E), 12, **options)
    assert low_E[:8] == expected
    assert low_E[4:] == free[4:]


@pytest.mark.parametrize("form", Form)
def test_refused_rows_on_a_rank_that_is_not_hot_change_nothing(
    plan_downgrade: Callable, form: Form
) -> None:
    rows_E, refused_E = [50, 50, 10, 10], [0, 0, 10, 10]
    low_E = plan_downgrade(counts_of_one(rows_E, rows_E, 2), 4, form=form, **REALLB)
    assert any(low_E)
    counts_RW = counts_of_one(rows_E, rows_E, 2, refused_E)
    assert plan_downgrade(counts_RW, 4, form=form, **REALLB) == low_E


def test_rows_that_sum_beyond_32_bits_are_counted_exactly(plan_downgrade: Callable) -> None:
    largest = (1 << 31) - 1
    vision_RE = torch.full((4, 4), largest)
    vision_RE[0, 1:] -= 1  # expert 0 has one row more than the others, and the mean lies between
    counts_RW = make_counts(torch.zeros(4, 4), vision_RE)
    assert plan_downgrade(counts_RW, 4, form=Form.EXPERTS, **REALLB) == [1, 0, 0, 0]


def test_counts_with_histograms_and_strided_rows_give_the_same_plan(
    plan_downgrade: Callable,
) -> None:
    text_RE, vision_RE = torch.tensor([[9, 0], [0, 0]]), torch.tensor([[30, 0], [10, 20]])
    counts_RW = make_counts(text_RE, vision_RE)
    wide = make_counts(text_RE, vision_RE, with_histogram=True)
    strided = torch.stack([counts_RW, counts_RW * 0], dim=1)[:, 0]
    for counts in (counts_RW, wide, strided):
        assert plan_downgrade(counts, 2, form=Form.RANK, **REALLB) == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 5}, "5 experts cannot be split evenly over 2 ranks"),
        ({"form": 3}, "form 3 is not one of"),
        ({"capacity_factor": -0.1}, "capacity_factor -0.1 is not between 0 and 100"),
        ({"vision_share": 1.5}, "vision_share 1.5 is not between 0 and 1"),
        ({"low_cost": float("nan")}, "low_cost nan is not between 0 and 1"),
    ],
)
def test_what_has_no_meaning_is_refused(
    load_op: Callable, options: dict[str, float], message: str
) -> None:
    counts_RW = counts_of_one([1, 1, 1, 1], [1, 1, 1, 1], num_ranks=2)
    with pytest.raises(ValueError, match=message):
        load_op("plan_downgrade")(
            counts_RW, **{"num_experts": 4, "form": Form.RANK, **REALLB, **options}
        )
