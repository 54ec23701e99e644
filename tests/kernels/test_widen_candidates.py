"""`widen_candidates` equals a sort of each token's local experts by score.

Shape letters: T tokens, K top-k, E experts, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import FLAG_PROTECTED
from sglang_moelb.kernels.testing import assert_close


@pytest.fixture
def widen_candidates(load_op: Callable) -> Callable:
    return load_op("widen_candidates")


def loop_widen(
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    flags_T: Tensor,
    *,
    first_local: int,
    num_local: int,
    num_extra: int,
) -> tuple[Tensor, Tensor]:
    """What widen_candidates promises, one token at a time, in numpy's float32."""
    all_ids, all_weights = [], []
    for t, ids in enumerate(ids_TK.tolist()):
        scores, weights = scores_TE[t].numpy(), weights_TK[t].numpy()
        extra: list[tuple[int, np.float32]] = []
        if 0 <= ids[0] < len(scores) and scores[ids[0]] > 0 and not flags_T[t] & FLAG_PROTECTED:
            scale = np.float32(weights[0] / scores[ids[0]])
            local = [e for e in range(first_local, first_local + num_local) if e not in ids]
            local = sorted((e for e in local if scores[e] > 0), key=lambda e: (-scores[e], e))
            if scale > 0 and math.isfinite(scale):
                extra = [(e, np.float32(scores[e] * scale)) for e in local[:num_extra]]
        extra += [(-1, np.float32(0))] * (num_extra - len(extra))
        all_ids.append(ids + [e for e, _ in extra])
        all_weights.append(weights.tolist() + [float(weight) for _, weight in extra])
    shape = (len(ids_TK), ids_TK.shape[1] + num_extra)
    return (
        torch.tensor(all_ids, dtype=ids_TK.dtype).view(shape),
        torch.tensor(all_weights, dtype=torch.float32).view(shape),
    )


def random_scores(
    num_tokens: int, num_experts: int, topk: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_TK, weights_TK, scores_TE and flags_T, with padding, protection, ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    scores_TE = logits_TE.mul(2).round().div(2).softmax(dim=1)  # rounding makes ties
    scores_TE[torch.rand(num_tokens, num_experts, generator=generator) < 0.2] = 0.0
    weights_TK, ids_TK = scores_TE.topk(topk, dim=1)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    ids_TK[torch.rand(num_tokens, generator=generator) < 0.1] = -1
    flags_T = (torch.rand(num_tokens, generator=generator) < 0.2) * FLAG_PROTECTED
    return ids_TK, weights_TK, scores_TE, flags_T.to(torch.uint8)


def assert_widens(widen_candidates: Callable, *args: Tensor, **options: int) -> None:
    ids_TC, weights_TC = widen_candidates(*args, **options)
    loop_ids_TC, loop_weights_TC = loop_widen(*args, **options)
    assert_close("ids_TC", loop_ids_TC, ids_TC)
    assert_close("weights_TC", loop_weights_TC, weights_TC, tolerance=0.0)


def test_the_worked_example_of_the_docstring(widen_candidates: Callable) -> None:
    ids_TC, weights_TC = widen_candidates(
        torch.tensor([[0]]),
        torch.tensor([[1.0]]),
        torch.tensor([[0.5, 0.125, 0.25, 0.125]]),
        torch.zeros(1, dtype=torch.uint8),
        first_local=1,
        num_local=3,
        num_extra=2,
    )
    assert ids_TC.tolist() == [[0, 2, 1]]
    assert weights_TC.tolist() == [[1.0, 0.5, 0.25]]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 90])
@pytest.mark.parametrize(("first_local", "num_local"), [(0, 4), (4, 4), (13, 3), (0, 16)])
def test_it_equals_a_sort_of_each_tokens_local_experts(
    widen_candidates: Callable,
    num_tokens: int,
    first_local: int,
    num_local: int,
    id_dtype: torch.dtype,
) -> None:
    ids_TK, *rest = random_scores(num_tokens, 16, 4, seed=num_tokens + first_local)
    local = {"first_local": first_local, "num_local": num_local}
    for num_extra in (0, 1, 3, 6):
        args = (ids_TK.to(id_dtype), *rest)
        assert_widens(widen_candidates, *args, **local, num_extra=num_extra)


def test_the_last_of_256_experts_can_be_a_candidate(widen_candidates: Callable) -> None:
    args = random_scores(20, 256, 8, seed=3)
    args[2][:, 255] = 1.0
    assert_widens(widen_candidates, *args, first_local=192, num_local=64, num_extra=8)


def test_equal_scores_give_the_lowest_ids_that_are_not_routed(widen_candidates: Callable) -> None:
    ids_TC, _ = widen_candidates(
        torch.tensor([[5, 1]]),
        torch.tensor([[0.5, 0.5]]),
        torch.full((1, 8), 0.125),
        torch.zeros(1, dtype=torch.uint8),
        first_local=0,
        num_local=8,
        num_extra=4,
    )
    assert ids_TC.tolist() == [[5, 1, 0, 2, 3, 4]]


def test_padding_protected_and_unscaled_tokens_get_no_candidates(
    widen_candidates: Callable,
) -> None:
    ids_TK = torch.tensor([[-1], [0], [0], [0], [9], [0], [0]])
    weights_TK = torch.tensor([[0.0], [1.0], [1.0], [1.0], [1.0], [0.0], [math.nan]])
    scores_TE = torch.full((7, 4), 0.25)
    scores_TE[2, 0], scores_TE[3, 0] = 0.0, math.nan
    flags_T = torch.zeros(7, dtype=torch.uint8)
    flags_T[1] = FLAG_PROTECTED
    ids_TC, weights_TC = widen_candidates(
        ids_TK, weights_TK, scores_TE, flags_T, first_local=0, num_local=4, num_extra=2
    )
    assert (ids_TC[:, 1:] == -1).all()
    assert (weights_TC[:, 1:] == 0).all()
    assert torch.equal(ids_TC[:, :1], ids_TK)


def test_scores_that_are_not_above_zero_are_no_candidates(widen_candidates: Callable) -> None:
    scores_TE = torch.tensor([[0.5, 0.0, math.nan, -1.0, 0.25]])
    flags_T = torch.zeros(1, dtype=torch.uint8)
    ids_TC, _ = widen_candidates(
        torch.tensor([[0]]),
        torch.tensor([[0.5]]),
        scores_TE,
        flags_T,
        first_local=1,
        num_local=4,
        num_extra=3,
    )
    assert ids_TC.tolist() == [[0, 4, -1, -1]]


def test_strided_rows_are_read_in_place(widen_candidates: Callable) -> None:
    ids_TK, weights_TK, scores_TE, flags_T = random_scores(30, 16, 8, seed=8)
    args = (ids_TK[:, :4], weights_TK[:, :4], scores_TE[:, :12].clone()[:, :12], flags_T)
    args[0][args[0] >= 12] = -1
    assert not args[0].is_contiguous()
    assert_widens(widen_candidates, *args, first_local=6, num_local=6, num_extra=2)


def test_local_experts_that_the_router_does_not_know_are_refused(
    widen_candidates: Callable,
) -> None:
    args = random_scores(2, 8, 2, seed=1)
    with pytest.raises(ValueError, match=r"local experts 6..9 are not all among the 8"):
        widen_candidates(*args, first_local=6, num_local=4, num_extra=1)
