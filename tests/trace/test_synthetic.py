"""Laws of synthetic loads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_moelb.trace.synthetic import SyntheticLoad, synthetic_passes
from sglang_moelb.trace.types import TraceError
from sglang_moelb.types import Topology
from tests.trace.world import LOAD, TOPOLOGY, assert_same


def test_the_same_seed_gives_the_same_passes() -> None:
    for one, other in zip(synthetic_passes(LOAD), synthetic_passes(LOAD), strict=True):
        assert_same(one, other)


def test_another_seed_gives_other_passes() -> None:
    one, other = (next(synthetic_passes(replace(LOAD, seed=seed))) for seed in (1, 2))
    assert (one.rows_LREM != other.rows_LREM).any()


@pytest.mark.parametrize("alpha", [0.0, 1.2, 5.0])
def test_every_token_has_topk_rows_and_no_expert_twice(alpha: float) -> None:
    for traced in synthetic_passes(replace(LOAD, alpha=alpha)):
        record = traced.record
        rows_LRM = traced.rows_LREM.sum(axis=2)
        vision_R = record.num_vision_tokens_R
        assert (rows_LRM[..., 1] == vision_R * TOPOLOGY.topk).all()
        assert (rows_LRM[..., 0] == (record.num_tokens_R - vision_R) * TOPOLOGY.topk).all()
        assert (traced.rows_LREM[..., 1] <= vision_R[:, None]).all()
        assert (record.rows_LEM == traced.rows_LREM.sum(axis=1)).all()


def test_more_alpha_is_more_skew() -> None:
    topology = Topology(num_layers=8, num_experts=64, num_ranks=4, topk=2)
    hottest = [
        next(
            synthetic_passes(
                SyntheticLoad(topology=topology, num_passes=1, alpha=alpha, vision_share=0.0)
            )
        )
        .record.rows_LEM.sum(axis=2)
        .max(axis=1)
        .mean()
        for alpha in (0.0, 0.5, 1.2)
    ]
    assert hottest == sorted(hottest)
    assert hottest[-1] > 5 * hottest[0]


def test_hot_experts_stay_without_drift_and_move_with_it() -> None:
    topology = Topology(num_layers=16, num_experts=64, num_ranks=4, topk=2)
    moved = []
    for drift in (0.0, 0.3, 1.0):
        load = SyntheticLoad(topology=topology, num_passes=8, drift=drift, vision_share=0.0)
        hottest = [t.record.rows_LEM.sum(axis=2).argmax(axis=1) for t in synthetic_passes(load)]
        moved.append(float(np.mean(hottest[0] != hottest[-1])))
    assert moved[0] == 0.0
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mix_of_modalities_is_the_one_asked_for(share: float) -> None:
    load = replace(LOAD, num_passes=200, vision_share=share)
    tokens = vision = 0
    for traced in synthetic_passes(load):
        tokens += int(traced.record.num_tokens_R.sum())
        vision += int(traced.record.num_vision_tokens_R.sum())
    assert vision / tokens == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": Topology(num_layers=1, num_experts=9, num_ranks=4, topk=2)}, "--experts 9"),
        ({"topology": Topology(num_layers=1, num_experts=8, num_ranks=4, topk=9)}, "--topk 9"),
        ({"topology": Topology(num_layers=0, num_experts=8, num_ranks=4, topk=2)}, "--layers 0"),
        ({"num_passes": 0}, "--passes 0"),
        ({"tokens_per_rank": 0}, "--tokens 0"),
        ({"alpha": -1.0}, "--alpha -1"),
        ({"alpha": float("nan")}, "--alpha nan"),
        ({"drift": 1.5}, "--drift 1.5: must be 0 to 1"),
        ({"vision_share": 2.0}, "--vision-share 2"),
    ],
)
def test_an_impossible_load_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        replace(LOAD, **change)  # type: ignore[arg-type]
