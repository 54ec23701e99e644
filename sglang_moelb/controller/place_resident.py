"""Which experts get resident replicas, and which weights are stored low to pay for them.

After Replicate-and-Quantize (R&Q, arXiv 2602.19938): heavy hitters of past traffic get replicas,
replicas are stored at low precision, and so are the least important originals, so that no rank's
memory grows. Never low: originals with replicas, and the most important share.

1. Replicas, layer by layer: the aim `experts` copies the expert whose busiest copy has most rows to
   the least loaded rank without one (R&Q copies one a layer; the rank is ours, the paper has none),
   until that expert has no rank to go to; the aim `ranks` takes the copy that leaves the least on
   the busiest rank (ours). Slots that `experts` leaves free are filled as under `ranks`.
2. Payment: on each rank the least important originals of each layer, as few as bring it within its
   budget of bytes. Equally many everywhere, so that one grouped GEMM, compiled for one number of
   experts, serves all layers and ranks. Where a rank has too few for it, there is a slot less.

Rows of an expert are taken to be split evenly between its copies.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_moelb.placement import (
    ExpertBytes,
    LayerPlacement,
    PlacementError,
    Replica,
)
from sglang_moelb.types import FloatArray, IntArray, Topology

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentLimits:
    """What a placement may use.

    `num_slots` are replicas of a rank and layer; `budget_share` is of the bytes that a rank's
    experts take before; `keep_share` of a rank's experts of a layer, the most important, stay high.
    """

    expert_bytes: ExpertBytes
    num_slots: int = 1
    budget_share: float = 1.0
    keep_share: float = 0.5
    aim: str = "experts"  # one of `placement.AIMS`


def place_resident(
    rows_LE: IntArray, importance_LE: FloatArray, topology: Topology, limits: ResidentLimits
) -> tuple[LayerPlacement, ...]:
    """A placement of all layers for traffic like `rows_LE`. Pure; ties go to the lower index.

    Args:
        rows_LE: routed rows on each expert in the passes to calibrate on.
        importance_LE: what each original is worth; higher is dearer.
        topology: sizes at the EP size that is planned for.
        limits: memory, slots and aim.

    Raises `PlacementError` where no choice of low experts meets the budget, without replicas even.

    Example: rows (9, 3, 0, 1, 1, 1) on 2 ranks of one slot, importance (0, 1, 2, 3, 4, 5), none
    kept: rank 1 takes a copy of expert 0. For a slot each rank stores two experts low, 1 and 2, and
    3 and 4; one would do but for the scales: in fp8 an expert takes a little more than half.
    """
    if rows_LE.shape != importance_LE.shape or rows_LE.shape != (
        topology.num_layers,
        topology.num_experts,
    ):
        raise PlacementError(
            f"rows of shape {rows_LE.shape} and importance of shape {importance_LE.shape}: the "
            f"model has {topology.num_layers} MoE layers of {topology.num_experts} experts"
        )
    for num_slots in range(limits.num_slots, -1, -1):
        replicas = [replicas_for(rows_E, topology, num_slots, limits.aim) for rows_E in rows_LE]
        num_low = _num_low(_most(replicas, topology), topology, limits)
        free_LE = _may_be_low(replicas, importance_LE, topology, limits.keep_share)
        if num_low <= _fewest(free_LE, topology):
            break
    else:
        _refuse_budget(_fewest(free_LE, topology), topology, limits)
    low_LE = _cheapest(importance_LE, free_LE, num_low, topology)
    return tuple(
        LayerPlacement(
            replicas=tuple(sorted(copies, key=lambda copy: (copy.rank, copy.expert))),
            low_experts=tuple(np.flatnonzero(low_E).tolist()),
        )
        for copies, low_E in zip(replicas, low_LE, strict=True)
    )


class _Layer:
    """The copies of one layer as they are chosen, and the load that they leave."""

    def __init__(self, rows_E: IntArray, topology: Topology, num_slots: int) -> None:
        self.rows_E, self.topology = rows_E.astype(np.float64), topology
        self.free_R = np.full(topology.num_ranks, num_slots)
        self.held_ER = np.zeros((topology.num_experts, topology.num_ranks), dtype=bool)
        experts = np.arange(topology.num_experts)
        self.held_ER[experts, experts // topology.experts_per_rank] = True

    def each_E(self) -> FloatArray:
        """Rows of a copy of each expert."""
        each_E: FloatArray = self.rows_E / self.held_ER.sum(axis=1).astype(np.float64)
        return each_E

    def load_R(self) -> FloatArray:
        """Rows of each rank."""
        load_R: FloatArray = (self.each_E()[:, None] * self.held_ER).sum(axis=0)
        return load_R

    def targets(self, expert: int) -> IntArray:
        """The ranks that could take a copy."""
        return np.flatnonzero(~self.held_ER[expert] & (self.free_R > 0))


def replicas_for(
    rows_E: IntArray, topology: Topology, num_slots: int, aim: str
) -> list[Replica]:
    """The replicas of one layer for traffic like `rows_E`, step 1 above, in the order made."""
    layer = _Layer(rows_E, topology, num_slots)
    made: list[Replica] = []
    for choose in RULES[aim]:
        while (found := choose(layer)) is not None:
            expert, rank = found
            layer.held_ER[expert, rank] = True
            layer.free_R[rank] -= 1
            made.append(Replica(expert=expert, rank=rank))
    return made


def _heaviest(layer: _Layer) -> tuple[int, int] | None:
    """The expert of the busiest copy, to the least loaded rank; None where that cannot go on.

    Past the first expert that has no rank to go to, no further copy can lower the score.
    """
    each_E = layer.each_E()
    expert = int(each_E.argmax())
    targets = layer.targets(expert)
    if not len(targets) or each_E[expert] <= each_E.mean():
        return None
    load_R = layer.load_R()
    return expert, int(targets[load_R[targets].argmin()])


def _best_for_ranks(layer: _Layer) -> tuple[int, int] | None:
    """The copy that leaves the least on the busiest rank, if that is less than now."""
    load_R, num_copies_E = layer.load_R(), layer.held_ER.sum(axis=1)
    busiest = int(load_R.argmax())  # only its own experts can spare it rows
    best: tuple[float, int, int] = (float(load_R[busiest]) * (1 - 1e-9), -1, -1)
    for expert in np.flatnonzero((layer.rows_E > 0) & layer.held_ER[:, busiest]):
        part = layer.rows_E[expert] / (num_copies_E[expert] + 1)
        targets = layer.targets(int(expert))
        if not len(targets):
            continue
        after_R = load_R - layer.held_ER[expert] * (part / num_copies_E[expert])
        left = np.maximum(after_R.max(), after_R[targets] + part)
        if left.min() < best[0]:
            best = (float(left.min()), int(expert), int(targets[left.argmin()]))
    return None if best[1] < 0 else (best[1], best[2])


Rule = Callable[[_Layer], tuple[int, int] | None]
RULES: Mapping[str, Sequence[Rule]] = {
    "experts": (_heaviest, _best_for_ranks),
    "ranks": (_best_for_ranks,),
}


def _num_low(num_slots: int, topology: Topology, limits: ResidentLimits) -> int:
    """Originals that each rank must store low in each layer, to be within its budget."""
    high, low = limits.expert_bytes.high, limits.expert_bytes.low
    before = topology.experts_per_rank * high
    need = before + num_slots * low - int(limits.budget_share * before + 1e-6)
    return max(0, -(-need // (high - low)))


def _most(replicas: list[list[Replica]], topology: Topology) -> int:
    """Slots that are used: the most replicas of a rank and layer."""
    ranks = range(topology.num_ranks)
    return max(sum(copy.rank == rank for copy in copies) for copies in replicas for rank in ranks)


def _may_be_low(
    replicas: list[list[Replica]], importance_LE: FloatArray, topology: Topology, keep_share: float
) -> BoolArray:
    """Whether each original may be stored low, [L, E]: neither replicated nor important."""
    per_rank = topology.experts_per_rank
    num_kept = int(np.ceil(keep_share * per_rank - 1e-9))
    by_rank = (topology.num_layers, topology.num_ranks, per_rank)
    order = np.argsort(-importance_LE.reshape(by_rank), axis=2, kind="stable")
    free = np.ones(by_rank, dtype=bool)
    np.put_along_axis(free, order[..., :num_kept], False, axis=2)
    free_LE: BoolArray = free.reshape(importance_LE.shape)
    for number, copies in enumerate(replicas):
        free_LE[number, [copy.expert for copy in copies]] = False
    return free_LE


def _fewest(free_LE: BoolArray, topology: Topology) -> int:
    """How many originals every rank can store low in every layer; one always stays high."""
    per_rank = topology.experts_per_rank
    return min(int(free_LE.reshape(-1, per_rank).sum(axis=1).min()), per_rank - 1)


def _cheapest(
    importance_LE: FloatArray, free_LE: BoolArray, num_low: int, topology: Topology
) -> BoolArray:
    """The `num_low` least important free originals of each rank and layer, bool [L, E]."""
    by_rank = (-1, topology.experts_per_rank)
    worth = np.where(free_LE, importance_LE, np.inf).reshape(by_rank)
    low = np.zeros(worth.shape, dtype=bool)
    order = np.argsort(worth, axis=1, kind="stable")[:, :num_low]
    np.put_along_axis(low, order, True, axis=1)
    low_LE: BoolArray = low.reshape(importance_LE.shape)
    return low_LE


def _refuse_budget(fewest: int, topology: Topology, limits: ResidentLimits) -> None:
    saved = 1 - limits.expert_bytes.low / limits.expert_bytes.high
    least = 1 - fewest * saved / topology.experts_per_rank
    raise PlacementError(
        f"budget {limits.budget_share:g} cannot be met, without replicas even: with a share of "
        f"{limits.keep_share:g} kept high some rank can store {fewest} of its "
        f"{topology.experts_per_rank} experts of a layer low. Use a budget of "
        f"{min(least + 5e-4, 1.0):.3f} or more, or keep less high"
    )
