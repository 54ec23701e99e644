"""`cut_tokens` equals a loop over rows in the order of their keys.

Shape letters: T tokens, C columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.count_experts.ref import count_experts
from sglang_moelb.kernels.keys import KeyRule
from sglang_moelb.kernels.plan_cuts.ref import plan_cuts
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_VISION
from sglang_moelb.kernels.testing import assert_close, random_routing
from sglang_moelb.types import Metric, Preference

RULE = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)
BIN_20 = 20 << layout.BIN_SHIFT


@pytest.fixture
def cut_tokens(load_op: Callable) -> Callable:
    return load_op("cut_tokens")


def loop_cut(
    ids_TC: Tensor,
    weights_TC: Tensor,
    keys_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    cut_bin_G: Tensor,
    cut_quota_G: Tensor,
    *,
    num_experts: int,
    topk: int,
) -> tuple[Tensor, Tensor, list[int]]:
    """What cut_tokens promises, one row at a time."""
    size, num_columns = num_experts // len(cut_bin_G), ids_TC.shape[1]
    keys, flags, ids = keys_TC.tolist(), flags_T.tolist(), ids_TC.tolist()
    dropped: set[tuple[int, int]] = set()
    waiting: dict[int, list[tuple[int, int]]] = {}
    for t in range(len(ids)):
        for c in range(num_columns):
            e = ids[t][c]
            if not 0 <= e < num_experts or flags[t] & FLAG_PROTECTED:
                continue
            cut_bin = int(cut_bin_G[e // size])
            if 0 <= cut_bin == keys[t][c] >> 10:
                waiting.setdefault(e // size, []).append((-keys[t][c], t * num_columns + c))
            elif keys[t][c] >> 10 < cut_bin:
                dropped.add((t, c))
    for group, rows in waiting.items():
        left, stopped = int(cut_quota_G[group]), False
        for _, flat in sorted(rows):
            t, c = divmod(flat, num_columns)
            left -= 1 if amounts_T is None else int(amounts_T[t])
            stopped = stopped or left < 0
            if stopped:
                dropped.add((t, c))
    new_ids, new_weights, stats = ids_TC.clone(), weights_TC.clone(), [0] * 8
    for t in range(len(ids)):
        for c in range(num_columns):
            if not 0 <= ids[t][c] < num_experts:
                continue
            mass, gone = round(float(weights_TC[t, c]) * 65536), (t, c) in dropped
            if gone:
                new_ids[t, c], new_weights[t, c] = -1, 0.0
            if c < topk:
                stats[0] += mass
                stats[1] += mass * gone
                stats[3] += gone
                stats[5] += gone and bool(flags[t] & FLAG_VISION)
            elif not gone:
                stats[2] += mass
                stats[4] += 1
    return new_ids, new_weights, stats


def assert_cuts(cut_tokens: Callable, *args: Tensor | None, **options: int) -> None:
    before = [None if arg is None else arg.clone() for arg in args]
    ids_TC, weights_TC, stats_8 = cut_tokens(*args, **options)
    loop_ids_TC, loop_weights_TC, loop_stats = loop_cut(*args, **options)
    assert_close("ids_TC", loop_ids_TC, ids_TC)
    assert_close("weights_TC", loop_weights_TC, weights_TC, tolerance=0.0)
    assert stats_8.tolist() == loop_stats
    for old, arg in zip(before, args, strict=True):
        assert arg is None or torch.equal(old, arg), "an input was written"


def test_the_worked_example_of_the_docstring(cut_tokens: Callable) -> None:
    ids_TC, weights_TC, stats_8 = cut_tokens(
        torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor([[0.25], [0.5], [0.25], [1.0]]),
        torch.tensor([[BIN_20 + 5], [BIN_20 + 9], [BIN_20 + 5], [40 << 10]], dtype=torch.int32),
        torch.tensor([0, 0, FLAG_VISION, 0], dtype=torch.uint8),
        None,
        torch.tensor([20], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        num_experts=1,
        topk=1,
    )
    assert ids_TC[:, 0].tolist() == [0, 0, -1, 0]
    assert weights_TC[:, 0].tolist() == [0.25, 0.5, 0.0, 1.0]
    assert stats_8.tolist() == [131072, 16384, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_groups", [8, 2])
@pytest.mark.parametrize("num_tokens", [0, 1, 60, 300])
def test_it_equals_a_loop_over_rows(
    cut_tokens: Callable, num_tokens: int, num_groups: int, weighted: bool
) -> None:
    case = random_routing(num_tokens, 5, 8, seed=num_tokens + num_groups, weighted=weighted)
    options = {"num_experts": 8, "topk": 3}
    inputs = (case.ids_TC.int(), case.weights_TC)
    row_W, keys_TC = count_experts(*inputs, case.flags_T, case.amounts_T, **options, key_rule=RULE)
    total = int(layout.histogram_of(row_W, 8).sum())
    capacity_G = torch.full((num_groups,), int(0.7 * total / num_groups))
    plan = plan_cuts(row_W[None], capacity_G, my_rank=0, num_experts=8)
    assert_cuts(cut_tokens, *inputs, keys_TC, case.flags_T, case.amounts_T, *plan, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("equal_keys", [False, True])
def test_ties_are_kept_by_flat_index_up_to_the_quota(
    cut_tokens: Callable, equal_keys: bool, weighted: bool
) -> None:
    case = random_routing(90, 4, 4, seed=2, weighted=weighted)
    keys_TC = torch.full((90, 4), BIN_20 + 3, dtype=torch.int32)
    if not equal_keys:
        keys_TC += torch.randint(0, 3, (90, 4), generator=torch.Generator().manual_seed(1)).int()
    unit = 128 if weighted else 1
    for quota in (0, 1, 7, 33, 59, 100_000):
        assert_cuts(
            cut_tokens,
            case.ids_TC,
            case.weights_TC,
            keys_TC,
            case.flags_T,
            case.amounts_T,
            torch.tensor([20, -1, 20, 21], dtype=torch.int32),
            torch.tensor([quota * unit, 5, 3 * unit + 1, 0], dtype=torch.int32),
            num_experts=4,
            topk=3,
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_ties_are_kept_by_flat_index_far_into_a_large_batch(
    cut_tokens: Callable, weighted: bool
) -> None:
    case = random_routing(5000, 4, 4, seed=3, weighted=weighted)
    num_rows = int((case.ids_TC >= 2).sum())
    quota_G = torch.tensor([0, num_rows * 8 // 10 * (128 if weighted else 1)])
    assert_cuts(
        cut_tokens,
        case.ids_TC,
        case.weights_TC,
        torch.full((5000, 4), BIN_20, dtype=torch.int32),
        case.flags_T,
        case.amounts_T,
        torch.tensor([-1, 20], dtype=torch.int32),
        quota_G.int(),
        num_experts=4,
        topk=3,
    )


def test_all_tokens_on_the_last_expert_of_256(cut_tokens: Callable) -> None:
    ids_TC = torch.full((70, 2), 255)
    weights_TC = torch.full((70, 2), 0.5)
    flags_T = torch.zeros(70, dtype=torch.uint8)
    options = {"num_experts": 256, "topk": 2}
    row_W, keys_TC = count_experts(ids_TC, weights_TC, flags_T, None, **options, key_rule=RULE)
    plan = plan_cuts(row_W[None], torch.full((64,), 51), my_rank=0, num_experts=256)
    assert_cuts(cut_tokens, ids_TC, weights_TC, keys_TC, flags_T, None, *plan, **options)
    kept_ids_TC, _, _ = cut_tokens(ids_TC, weights_TC, keys_TC, flags_T, None, *plan, **options)
    assert (kept_ids_TC.flatten() >= 0).nonzero()[:, 0].tolist() == list(range(51))


def test_nothing_changes_when_no_group_is_cut(cut_tokens: Callable) -> None:
    case = random_routing(40, 4, 8, seed=3)
    none_G, quota_G = torch.full((8,), -1).int(), torch.zeros(8).int()
    keys_TC = torch.zeros(40, 4, dtype=torch.int32)
    ids_TC, weights_TC, stats_8 = cut_tokens(
        case.ids_TC,
        case.weights_TC,
        keys_TC,
        case.flags_T,
        None,
        none_G,
        quota_G,
        num_experts=8,
        topk=4,
    )
    assert torch.equal(ids_TC, case.ids_TC)
    assert torch.equal(weights_TC, case.weights_TC)
    assert stats_8[1:].tolist() == [0] * 7


def test_protected_tokens_and_ids_beyond_the_experts_are_never_cut(cut_tokens: Callable) -> None:
    case = random_routing(40, 4, 8, seed=4, protected_share=1.0)
    ids_TC = torch.cat((case.ids_TC, torch.full((40, 1), 8)), dim=1)
    weights_TC = torch.cat((case.weights_TC, torch.ones(40, 1)), dim=1)
    flags_T = case.flags_T.clone()
    flags_T[:5] = 0
    args = (
        ids_TC,
        weights_TC,
        torch.zeros(40, 5, dtype=torch.int32),
        flags_T,
        None,
        torch.full((8,), 63).int(),
        torch.zeros(8).int(),
    )
    assert_cuts(cut_tokens, *args, num_experts=8, topk=5)
    kept_ids_TC, _, _ = cut_tokens(*args, num_experts=8, topk=5)
    assert torch.equal(kept_ids_TC[5:], ids_TC[5:])
    assert (kept_ids_TC[:, 4] == 8).all()
    assert (kept_ids_TC[:5, :4] == -1).all()


def test_odd_weights_are_counted_as_documented(cut_tokens: Callable) -> None:
    halves = 2.0**-17 * torch.tensor([[1.0, 3.0, 5.0, 7.0]])  # 0.5, 1.5, 2.5, 3.5 units of mass
    for weights_TC, mass in (
        (halves, 0 + 2 + 2 + 4),
        (torch.tensor([[float("nan"), 1.0]]), 65536),
        (torch.tensor([[float("inf"), 0.0]]), 1 << 31),
    ):
        stats_8 = cut_tokens(
            torch.zeros_like(weights_TC, dtype=torch.int64),
            weights_TC,
            torch.zeros_like(weights_TC, dtype=torch.int32),
            torch.zeros(1, dtype=torch.uint8),
            None,
            torch.tensor([-1], dtype=torch.int32),
            torch.tensor([0], dtype=torch.int32),
            num_experts=1,
            topk=weights_TC.shape[1],
        )[2]
        assert stats_8[0] == mass


def test_groups_that_do_not_divide_the_experts_are_refused(cut_tokens: Callable) -> None:
    case = random_routing(4, 2, 4, seed=1)
    keys_TC = torch.zeros(4, 2, dtype=torch.int32)
    cuts = (torch.full((3,), -1).int(), torch.zeros(3).int())
    with pytest.raises(ValueError, match="4 experts cannot be split evenly in 3 groups"):
        cut_tokens(
            case.ids_TC, case.weights_TC, keys_TC, case.flags_T, None, *cuts, num_experts=4, topk=2
        )
