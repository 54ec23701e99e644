"""Laws of resident placements: sound, within memory, and better for the load that made them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moelb.controller.place_resident import ResidentLimits, place_resident
from sglang_moelb.controller.resident_load import LoadSums, SplitRows, lis, rank_rows
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    LayerPlacement,
    Placement,
    PlacementError,
    RankMemory,
    Replica,
    Sizes,
    check,
    decode,
    layout,
    memory_of,
    num_slots_of,
)
from sglang_moelb.types import Topology

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
BYTES = ExpertBytes(high=2 << 14, low=(1 << 14) + 4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Topology, ResidentLimits]:
    num_ranks = draw(st.sampled_from([2, 3, 4, 8]))
    per_rank = draw(st.integers(4, 8))
    topology = Topology(
        num_layers=draw(st.integers(1, 3)),
        num_experts=num_ranks * per_rank,
        num_ranks=num_ranks,
        topk=2,
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (topology.num_layers, topology.num_experts)
    rows = rng.zipf(draw(st.sampled_from([1.3, 2.0, 4.0])), shape).clip(max=10_000)
    rows *= rng.integers(0, 2, shape) if draw(st.booleans()) else 1
    limits = ResidentLimits(
        expert_bytes=BYTES,
        num_slots=draw(st.integers(0, 3)),
        keep_share=draw(st.sampled_from([0.0, 0.25, 1.0])),
        aim=draw(st.sampled_from(["experts", "ranks"])),
    )
    return rows, rng.random(shape), topology, limits


def placement_of(layers: tuple[LayerPlacement, ...], topology: Topology) -> Placement:
    before, after = memory_of(layers, topology, BYTES)
    return Placement(
        schema=SCHEMA,
        version=VERSION,
        format="fp8",
        sizes=Sizes(
            num_layers=topology.num_layers,
            num_experts=topology.num_experts,
            num_ranks=topology.num_ranks,
            topk=topology.topk,
        ),
        expert_bytes=BYTES,
        layers=layers,
        memory=RankMemory(before=before, after=after),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_placement_is_sound_within_memory_and_never_worse_for_its_aim(
    case: tuple[np.ndarray, np.ndarray, Topology, ResidentLimits],
) -> None:
    rows, importance, topology, limits = case
    layers = place_resident(rows, importance, topology, limits)
    placement = placement_of(layers, topology)
    check(placement)
    assert decode(placement.to_json(), "x") == placement
    assert max(placement.memory.after) <= placement.memory.before[0]
    plain = tuple(LayerPlacement() for _ in layers)
    if limits.aim == "experts":
        assert (lis(rows, layers) <= lis(rows, plain) + 1e-9).all()
    else:
        before, after = (rank_rows(rows[None], x, topology)[0].max(axis=1) for x in (plain, layers))
        assert (after <= before + 1e-6).all()
    per_rank = topology.experts_per_rank
    num_kept = int(np.ceil(limits.keep_share * per_rank))
    for number, layer in enumerate(layers):
        for rank in range(topology.num_ranks):
            mine = importance[number, rank * per_rank : (rank + 1) * per_rank]
            dearest = rank * per_rank + np.argsort(-mine, kind="stable")[:num_kept]
            assert not set(dearest.tolist()) & set(layer.low_experts)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_expert_has_its_copies_at_places_of_their_own(
    case: tuple[np.ndarray, np.ndarray, Topology, ResidentLimits],
) -> None:
    rows, importance, topology, limits = case
    layers = place_resident(rows, importance, topology, limits)
    num_slots = num_slots_of(layers, topology.num_ranks)
    assert num_slots <= limits.num_slots
    for layer in layers:
        found = layout(layer, topology, num_slots)
        ids = found.copies_EC[found.copies_EC >= 0]
        assert len(set(ids.tolist())) == len(ids) == topology.num_experts + len(layer.replicas)
        assert ids.max() < topology.num_ranks * found.num_places
        homes = found.copies_EC[:, 0] // found.num_places
        assert (homes == np.arange(topology.num_experts) // topology.experts_per_rank).all()
        for rank in range(topology.num_ranks):
            held = found.high[rank] + found.low[rank] + found.replicas[rank]
            for place, expert in enumerate(held):
                assert rank * found.num_places + place in found.copies_EC[expert]
        assert (found.num_copies_E == (found.copies_EC >= 0).sum(axis=1)).all()


def test_rows_are_neither_lost_nor_made() -> None:
    topology = Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1)
    layers = (LayerPlacement(replicas=(Replica(expert=0, rank=1),), low_experts=(2,)),)
    rows = np.array([[[9, 1, 1, 1]]])
    np.testing.assert_allclose(rank_rows(rows, layers, topology), [[[5.5, 6.5]]])
    np.testing.assert_allclose(lis(rows[0], layers), [4 * 4.5 / 12])


@settings(max_examples=40, deadline=None)
@given(cases())
def test_an_even_split_of_whole_rows_loses_none_and_is_near_the_halves(
    case: tuple[np.ndarray, np.ndarray, Topology, ResidentLimits],
) -> None:
    rows, importance, topology, limits = case
    layers = place_resident(rows, importance, topology, limits)
    split_LR = SplitRows(layers, topology)(rows)
    assert (split_LR.sum(axis=1) == rows.sum(axis=1)).all()
    num_copies = max(len(layer.replicas) for layer in layers) + 1
    assert np.abs(split_LR - rank_rows(rows[None], layers, topology)[0]).max() <= num_copies


def test_the_example_of_the_layout_holds() -> None:
    layer = LayerPlacement(replicas=(Replica(expert=0, rank=1),), low_experts=(1, 3))
    found = layout(layer, Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1), 1)
    assert found.num_places == 3
    assert found.copies_EC.tolist() == [[0, 5], [1, -1], [3, -1], [4, -1]]
    assert (found.high, found.low, found.replicas) == (((0,), (2,)), ((1,), (3,)), ((), (0,)))


def test_the_hottest_expert_of_each_layer_is_copied_to_the_idlest_rank() -> None:
    topology = Topology(num_layers=2, num_experts=12, num_ranks=3, topk=1)
    rows = np.array([[50, 1, 1, 1, 9, 9, 9, 9, 2, 2, 2, 2], [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 70]])
    limits = ResidentLimits(expert_bytes=BYTES, keep_share=0.0)
    layers = place_resident(rows, np.ones(rows.shape), topology, limits)
    assert Replica(expert=0, rank=2) in layers[0].replicas
    assert Replica(expert=11, rank=0) in layers[1].replicas


def test_the_example_of_the_planner_holds() -> None:
    topology = Topology(num_layers=1, num_experts=6, num_ranks=2, topk=1)
    limits = ResidentLimits(expert_bytes=BYTES, keep_share=0.0)
    rows, importance = np.array([[9, 3, 0, 1, 1, 1]]), np.arange(6.0)[None]
    (layer,) = place_resident(rows, importance, topology, limits)
    assert layer.replicas == (Replica(expert=0, rank=1),)
    assert layer.low_experts == (1, 2, 3, 4)


def test_the_figures_are_of_all_passes_and_of_each() -> None:
    topology = Topology(num_layers=1, num_experts=2, num_ranks=2, topk=1)
    sums = LoadSums((LayerPlacement(),), topology)
    sums.add(np.array([[[10, 0]], [[0, 10]]]))
    figures = sums.figures()
    assert figures.lis == figures.rank_balance == [1.0]
    assert figures.pass_balance == [2.0]


BAD = [
    (LayerPlacement(replicas=(Replica(expert=0, rank=0),)), "its home"),
    (LayerPlacement(replicas=(Replica(expert=9, rank=1),)), "not there"),
    (LayerPlacement(replicas=(Replica(expert=0, rank=1),) * 2), "named twice"),
    (LayerPlacement(low_experts=(7,)), "low expert 7"),
    (LayerPlacement(low_experts=(0, 1)), "no expert left"),
    (LayerPlacement(low_experts=(0,)), "one grouped GEMM"),
    (LayerPlacement(replicas=(Replica(expert=0, rank=1),), low_experts=(0,)), "stay at high"),
    (LayerPlacement(replicas=(Replica(expert=0, rank=1),)), "more than"),
]


@pytest.mark.parametrize(("layer", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_placement_that_contradicts_itself_is_refused(
    layer: LayerPlacement, problem: str
) -> None:
    topology = Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1)
    sound = placement_of((LayerPlacement(),), topology)
    placement = msgspec.structs.replace(sound, layers=(layer,))
    if problem == "more than":
        placement = placement_of((layer,), topology)
    with pytest.raises(PlacementError, match=problem):
        check(placement)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": "x"}, "not a placement"),
        ({"version": 2}, "reads version 1"),
        ({"format": "nvfp4"}, "use mxfp4 for 4 bits, or fp8"),
        ({"format": "int7"}, "use one of fp8"),
        ({"layers": []}, "0 layers"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_other_files_are_refused_by_name(change: dict[str, object], problem: str) -> None:
    topology = Topology(num_layers=1, num_experts=4, num_ranks=2, topk=1)
    tree = msgspec.to_builtins(placement_of((LayerPlacement(),), topology)) | change
    with pytest.raises(PlacementError, match=problem):
        decode(msgspec.json.encode(tree), "placement.json")


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(2, 3), (4, 2)])
def test_on_the_probes_traffic_lis_falls_by_more_than_the_papers_share_and_memory_does_not_grow(
    num_ranks: int, num_slots: int
) -> None:
    """R&Q reports 1.4; judged by passes that the placement was not made from."""
    found = json.loads((RESULTS / "resident_probe_cpu_20261122.json").read_bytes())
    rows, others = (np.array(found[name]["rows"]) for name in ("calibrated", "others"))
    importance = np.array(found["removal"]["importance"])
    topology = Topology(
        num_layers=len(rows), num_experts=rows.shape[1], num_ranks=num_ranks, topk=found["topk"]
    )
    limits = ResidentLimits(expert_bytes=BYTES, num_slots=num_slots)
    layers = place_resident(rows, importance, topology, limits)
    check(placement_of(layers, topology))
    plain = tuple(LayerPlacement() for _ in layers)
    assert lis(others, plain).mean() / lis(others, layers).mean() > 1.4
    before, after = (rank_rows(others[None], x, topology)[0].max(axis=1) for x in (plain, layers))
    assert after.mean() < 0.95 * before.mean()
