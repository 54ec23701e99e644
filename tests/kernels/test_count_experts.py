"""`count_experts` equals a loop over tokens and columns, and its keys rank as they say.

Shape letters: T tokens, C columns, E experts, W row width.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.count_experts import KeyRule
from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION
from sglang_moelb.kernels.testing import assert_close, random_routing
from sglang_moelb.types import Metric, Preference

SCORE_IMAGE_FIRST = KeyRule(metric=Metric.SCORE, preference=Preference.IMAGE_FIRST)
WORD = 0xFFFFFFFF
REFUSED = FLAG_PROTECTED | FLAG_REFUSED


@pytest.fixture
def count_experts(load_op: Callable) -> Callable:
    return load_op("count_experts")


@pytest.fixture
def count_layers(load_op: Callable) -> Callable:
    return load_op("count_experts", "count_layers")


def loop_key(rule: KeyRule, t: int, e: int, weight: float, flag: int, amount: int, T: int) -> int:
    vision = bool(flag & FLAG_VISION)
    first = {Preference.UNIFORM: False, Preference.IMAGE_FIRST: not vision}.get(
        Preference(rule.preference), vision
    )
    place = (t * 32767) // max(T - 1, 1)
    if rule.metric == Metric.SCORE:
        value = struct.unpack("f", struct.pack("f", weight * amount / AMOUNT_ONE))[0]
        metric = 0
        if value > 0:
            bits = struct.unpack("i", struct.pack("f", value))[0]
            origin = struct.unpack("i", struct.pack("f", 2.0**-12))[0]
            metric = min(max((bits - origin) >> 12, 0), 32767)
    elif rule.metric == Metric.RANDOM:
        x = (t * 0x9E3779B1 + e * 0x85EBCA77 + rule.seed * 0xC2B2AE3D) & WORD
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
        metric = (x ^ (x >> 16)) >> 17
    else:
        metric = place if rule.metric == Metric.REVERSE else 32767 - place
    return (int(first) << 15) | metric


def loop_count(
    ids_TC: Tensor,
    weights_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    *,
    num_experts: int,
    topk: int,
    key_rule: KeyRule | None,
) -> tuple[Tensor, Tensor | None]:
    """What count_experts promises, one entry at a time."""
    row = [0] * layout.row_width(num_experts, with_histogram=key_rule is not None)
    keys = torch.zeros(ids_TC.shape, dtype=torch.int32)
    bins_at = layout.NUM_HEADER + num_experts * layout.NUM_COUNTS
    flags, num_tokens = flags_T.tolist(), len(ids_TC)
    for t, ids in enumerate(ids_TC.tolist()):
        amount = 1 if amounts_T is None else int(amounts_T[t])
        vision, protected = flags[t] & FLAG_VISION, flags[t] & FLAG_PROTECTED
        if max(ids[:topk]) >= 0:
            row[layout.H_TOKENS] += 1
            row[layout.H_AMOUNT] += amount
            row[layout.H_VISION_TOKENS] += bool(vision)
            row[layout.H_VISION_AMOUNT] += amount if vision else 0
            row[layout.H_PROTECTED_TOKENS] += bool(protected)
            row[layout.H_REFUSED_TOKENS] += bool(flags[t] & FLAG_REFUSED)
        for c, e in enumerate(ids):
            if not 0 <= e < num_experts:
                continue
            at = layout.NUM_HEADER + e * layout.NUM_COUNTS
            if c < topk:
                row[at + (layout.C_VISION_ROWS if vision else layout.C_TEXT_ROWS)] += 1
                row[at + layout.C_REFUSED_ROWS] += bool(flags[t] & FLAG_REFUSED)
                row[at + layout.C_PROTECTED_AMOUNT] += amount if protected else 0
            row[at + layout.C_CUTTABLE_AMOUNT] += 0 if protected else amount
            if key_rule is None:
                continue
            scale = AMOUNT_ONE if amounts_T is None else amount
            weight = float(weights_TC[t, c])
            keys[t, c] = loop_key(key_rule, t, e, weight, flags[t], scale, num_tokens)
            row[bins_at + e * 64 + (int(keys[t, c]) >> 10)] += 0 if protected else amount
    return torch.tensor(row, dtype=torch.int32), None if key_rule is None else keys


def assert_counts(count_experts: Callable, *args: Tensor | None, **options: object) -> None:
    row_W, keys_TC = count_experts(*args, **options)
    loop_W, loop_TC = loop_count(*args, **options)
    assert_close("row_W", loop_W, row_W)
    assert (keys_TC is None) == (loop_TC is None)
    if keys_TC is not None:
        assert_close("keys_TC", loop_TC, keys_TC)


def test_the_worked_example_of_the_docstring(count_experts: Callable) -> None:
    row_W, keys_TC = count_experts(
        torch.tensor([[0, 1], [1, -1], [-1, -1], [1, 0]]),
        torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]),
        torch.tensor([0, FLAG_VISION, 0, REFUSED], dtype=torch.uint8),
        None,
        num_experts=2,
        topk=2,
        key_rule=None,
    )
    assert row_W.tolist() == [3, 1, 1, 1, 3, 1, 0, 0, 2, 0, 1, 1, 1, 2, 1, 1, 1, 2]
    assert keys_TC is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("preference", list(Preference))
@pytest.mark.parametrize("metric", list(Metric))
def test_it_equals_a_double_loop_under_every_key_rule(
    count_experts: Callable, metric: Metric, preference: Preference, weighted: bool
) -> None:
    case = random_routing(41, 6, 8, seed=metric * 3 + preference, weighted=weighted)
    rule = KeyRule(metric=metric, preference=preference, seed=7 + metric)
    inputs = (case.ids_TC, case.weights_TC, case.flags_T, case.amounts_T)
    assert_counts(count_experts, *inputs, num_experts=8, topk=4, key_rule=rule)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65, 300])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_it_equals_a_double_loop_for_every_batch_size(
    count_experts: Callable, num_tokens: int, id_dtype: torch.dtype
) -> None:
    case = random_routing(num_tokens, 3, 5, seed=num_tokens)
    inputs = (case.ids_TC.to(id_dtype), case.weights_TC, case.flags_T, case.amounts_T)
    assert_counts(count_experts, *inputs, num_experts=5, topk=3, key_rule=None)
    assert_counts(count_experts, *inputs, num_experts=5, topk=2, key_rule=SCORE_IMAGE_FIRST)


def test_256_experts_up_to_the_last_are_counted(count_experts: Callable) -> None:
    ids_TC = torch.arange(256).view(32, 8).flip(0)
    weights_TC = torch.full((32, 8), 0.125)
    flags_T = torch.zeros(32, dtype=torch.uint8)
    inputs = (ids_TC, weights_TC, flags_T, None)
    assert_counts(count_experts, *inputs, num_experts=256, topk=8, key_rule=SCORE_IMAGE_FIRST)


def test_all_rows_on_one_expert_with_equal_scores_fill_one_bin(count_experts: Callable) -> None:
    ids_TC = torch.full((200, 2), 3)
    weights_TC = torch.full((200, 2), 0.5)
    flags_T = torch.full((200,), FLAG_VISION, dtype=torch.uint8)
    row_W, _ = count_experts(
        ids_TC, weights_TC, flags_T, None, num_experts=4, topk=2, key_rule=SCORE_IMAGE_FIRST
    )
    histogram_EB = layout.histogram_of(row_W, 4)
    assert histogram_EB[3].max() == 400
    assert histogram_EB.sum() == 400


def test_protected_rows_are_counted_but_are_never_cuttable(count_experts: Callable) -> None:
    case = random_routing(50, 4, 8, seed=5, protected_share=1.0)
    row_W, _ = count_experts(
        case.ids_TC, case.weights_TC, case.flags_T, None, num_experts=8, topk=4, key_rule=None
    )
    counts_E5 = layout.counts_of(row_W, 8)
    assert counts_E5[:, layout.C_CUTTABLE_AMOUNT].sum() == 0
    assert counts_E5[:, layout.C_PROTECTED_AMOUNT].sum() == (case.ids_TC >= 0).sum()


@pytest.mark.parametrize("last", [0, FLAG_PROTECTED, REFUSED, REFUSED | FLAG_VISION])
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_only_rows_of_requests_that_refuse_are_refused_and_not_those_of_decode(
    count_experts: Callable, num_tokens: int, last: int
) -> None:
    case = random_routing(num_tokens, 4, 8, seed=7, protected_share=0.0, padding_share=0.0)
    flags_T = case.flags_T.clone()
    flags_T[: num_tokens // 2] |= FLAG_PROTECTED
    flags_T[-1] = last
    ids_TC = case.ids_TC.clone()
    ids_TC[-1] = torch.tensor([2, 5, -1, 0])
    inputs = (ids_TC, case.weights_TC, flags_T, None)
    assert_counts(count_experts, *inputs, num_experts=8, topk=3, key_rule=None)
    row_W, _ = count_experts(*inputs, num_experts=8, topk=3, key_rule=None)
    refuses = int(bool(last & FLAG_REFUSED))
    assert row_W[layout.H_REFUSED_TOKENS] == refuses
    refused_E = layout.counts_of(row_W, 8)[:, layout.C_REFUSED_ROWS]
    assert refused_E.tolist() == [0, 0, refuses, 0, 0, refuses, 0, 0]


def test_text_and_vision_rows_sum_to_the_routed_rows(count_experts: Callable) -> None:
    case = random_routing(128, 8, 16, seed=6, skew=8.0)
    row_W, _ = count_experts(
        case.ids_TC, case.weights_TC, case.flags_T, None, num_experts=16, topk=6, key_rule=None
    )
    counts_E5 = layout.counts_of(row_W, 16)
    rows = counts_E5[:, layout.C_TEXT_ROWS].sum() + counts_E5[:, layout.C_VISION_ROWS].sum()
    assert rows == (case.ids_TC[:, :6] >= 0).sum()


def test_padding_ids_beyond_the_experts_and_lone_candidates_are_no_tokens(
    count_experts: Callable,
) -> None:
    ids_TC = torch.tensor([[-1, -1, 2], [4, 9, -1], [-1, 1, 0]])
    weights_TC = torch.full((3, 3), 0.3)
    flags_T = torch.full((3,), FLAG_VISION, dtype=torch.uint8)
    inputs = (ids_TC, weights_TC, flags_T, None)
    assert_counts(count_experts, *inputs, num_experts=4, topk=2, key_rule=SCORE_IMAGE_FIRST)
    row_W, _ = count_experts(*inputs, num_experts=4, topk=2, key_rule=None)
    assert row_W[layout.H_TOKENS] == 2  # one of them on an expert that is not counted here


def test_odd_weights_have_ordered_keys(count_experts: Callable) -> None:
    odd = [math.nan, -1.0, 0.0, 1e-40, 2.0**-12, 0.1, 0.1001, 1.0, 15.9, 16.0, 1e9, math.inf]
    weights_TC = torch.tensor([odd])
    ids_TC = torch.zeros(1, len(odd), dtype=torch.int64)
    rule = KeyRule(metric=Metric.SCORE, preference=Preference.UNIFORM)
    _, keys_TC = count_experts(
        ids_TC,
        weights_TC,
        torch.zeros(1, dtype=torch.uint8),
        None,
        num_experts=1,
        topk=len(odd),
        key_rule=rule,
    )
    keys = keys_TC[0].tolist()
    assert keys[:5] == [0] * 5
    assert keys[5] < keys[6] < keys[7] < keys[8] < keys[9] == keys[10] == keys[11] == 32767


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("preference", list(Preference))
def test_routed_first_ranks_every_candidate_below_every_routed_row(
    count_experts: Callable, metric: Metric, preference: Preference
) -> None:
    case = random_routing(40, 6, 8, seed=3)
    inputs = (case.ids_TC, case.weights_TC, case.flags_T, None)
    plain = KeyRule(metric=metric, preference=preference, seed=5)
    first = KeyRule(metric=metric, preference=preference, seed=5, routed_first=True)
    sizes = {"num_experts": 8, "topk": 4}
    _, plain_TC = count_experts(*inputs, key_rule=plain, **sizes)
    row_W, keys_TC = count_experts(*inputs, key_rule=first, **sizes)
    there_TC = case.ids_TC >= 0
    routed_T4, extra_T2 = there_TC[:, :4], there_TC[:, 4:]
    assert keys_TC[:, :4][routed_T4].min() >= 1 << 15 > keys_TC[:, 4:][extra_T2].max()
    assert torch.equal(keys_TC[:, :4][routed_T4], (plain_TC[:, :4][routed_T4] >> 1) + (1 << 15))
    assert torch.equal(keys_TC[:, 4:][extra_T2], plain_TC[:, 4:][extra_T2] >> 1)
    cuttable_TC = there_TC & ((case.flags_T & FLAG_PROTECTED) == 0)[:, None]
    bins = torch.bincount(keys_TC[cuttable_TC] >> layout.BIN_SHIFT, minlength=layout.NUM_BINS)
    assert torch.equal(layout.histogram_of(row_W, 8).sum(dim=0).long(), bins)


def test_an_unknown_metric_is_refused(count_experts: Callable) -> None:
    case = random_routing(3, 2, 4, seed=1)
    rule = KeyRule(metric=9, preference=0)
    inputs = (case.ids_TC, case.weights_TC, case.flags_T, None)
    with pytest.raises(ValueError, match=r"metric 9 is not one of \[0, 1, 2, 3\]"):
        count_experts(*inputs, num_experts=4, topk=2, key_rule=rule)


def test_strided_rows_are_read_in_place(count_experts: Callable) -> None:
    case = random_routing(33, 8, 8, seed=9)
    inputs = (case.ids_TC[:, :4], case.weights_TC[:, :4], case.flags_T, None)
    assert not inputs[0].is_contiguous()
    assert_counts(count_experts, *inputs, num_experts=8, topk=4, key_rule=SCORE_IMAGE_FIRST)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_many_layers_are_counted_as_each_alone(
    count_layers: Callable, num_layers: int, num_tokens: int, id_dtype: torch.dtype
) -> None:
    cases = [random_routing(num_tokens, 4, 6, seed=layer) for layer in range(num_layers)]
    ids_LTK = torch.stack([case.ids_TC for case in cases]).to(id_dtype)
    rows_LW = count_layers(ids_LTK, cases[0].flags_T, num_experts=6)
    loops = [
        loop_count(
            ids_TK, cases[0].weights_TC, cases[0].flags_T, None,
            num_experts=6, topk=4, key_rule=None,
        )[0]
        for ids_TK in ids_LTK
    ]  # fmt: skip
    assert_close("rows_LW", torch.stack(loops), rows_LW)
    place_LW = torch.full_like(rows_LW, 9)
    out_LW = count_layers(ids_LTK, cases[0].flags_T, num_experts=6, out_LW=place_LW)
    assert out_LW.data_ptr() == place_LW.data_ptr()
    assert_close("out_LW", rows_LW, place_LW)
