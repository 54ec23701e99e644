"""Which experts get resident replicas, and which weights are stored low to pay for them.

After Replicate-and-Quantize (R&Q, arXiv 2602.19938): heavy hitters of past traffic get replicas,
replicas are stored at low precision, and so are the least important originals, so that no rank's
memory grows. Never low: originals with replicas, and the most important share of each layer.

1. Replicas, layer by layer: the aim `experts` copies the expert whose busiest copy has most rows to
   the least loaded rank without one (R&Q copies one a layer; the rank is ours, the paper has none),
   until that expert has no rank to go to; the aim `ranks` takes the copy that leaves the least on
   the busiest rank (ours). Slots that `experts` leaves free are filled as under `ranks`.
2. Payment, rank by rank over all layers: the least important originals, as few as bring the rank
   within its budget of bytes. Where they do not suffice, the layer that is left most even without
   gives up its last replicas, down to that rank's.

Rows of an expert are taken to be split evenly between its copies.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_moelb.controller.resident_load import lis
from sglang_moelb.placement import (
    ExpertBytes,
    LayerPlacement,
    PlacementError,
    Replica,
)
from sglang_moelb.types import FloatArray, IntArray, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentLimits:
    """What a placement may use.

    `num_slots` are replicas of a rank and layer; `budget_share` is of the bytes that a rank's
    experts take before; `keep_share` of each layer's experts, the most important, stay high.
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
        importance_LE: what each original is worth, comparable over layers; higher is dearer.
        topology: sizes at the EP size that is planned for.
        limits: memory, slots and aim.

    Raises `PlacementError` where no choice of low experts meets the budget, without replicas even.

    Example: rows (9, 3, 0, 1, 1, 1) on 2 ranks of one slot, importance (0, 1, 2, 3, 4, 5), none
    kept: rank 1 takes a copy of expert 0 and stores its experts 3 and 4 low. One would do, but for
    the scales: in fp8 an expert takes a little more than half.
    """
    if rows_LE.shape != importance_LE.shape or rows_LE.shape != (
        topology.num_layers,
        topology.num_experts,
    ):
        raise PlacementError(
            f"rows of shape {rows_LE.shape} and importance of shape {importance_LE.shape}: the "
            f"model has {topology.num_layers} MoE layers of {topology.num_experts} experts"
        )
    rules = RULES[limits.aim]
    replicas = [_replicas(rows_E, topology, limits.num_slots, rules) for rows_E in rows_LE]
    while isinstance(low_LE := _low_experts(replicas, importance_LE, topology, limits), _Unpaid):
        if not _give_up_one(replicas, rows_LE, low_LE.rank):
            _refuse_budget(low_LE, topology, limits)
    return tuple(
        LayerPlacement(
            replicas=tuple(sorted(copies, key=lambda copy: (copy.rank, copy.expert))),
            low_experts=tuple(np.flatnonzero(low_E).tolist()),
        )
        for copies, low_E in zip(replicas, low_LE, strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unpaid:
    """A rank whose experts take more than its budget, whatever is stored low."""

    rank: int
    missing_bytes: int


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


def _replicas(
    rows_E: IntArray,
    topology: Topology,
    num_slots: int,
    rules: Sequence[Rule],
) -> list[Replica]:
    layer = _Layer(rows_E, topology, num_slots)
    made: list[Replica] = []
    for choose in rules:
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
    best: tuple[float, int, int] = (float(load_R.max()) * (1 - 1e-9), -1, -1)
    for expert in np.flatnonzero(layer.rows_E > 0):
        part = layer.rows_E[expert] / (num_copies_E[expert] + 1)
        for rank in layer.targets(int(expert)):
            after_R = load_R - layer.held_ER[expert] * (part / num_copies_E[expert])
            after_R[rank] += part
            if after_R.max() < best[0]:
                best = (float(after_R.max()), int(expert), int(rank))
    return None if best[1] < 0 else (best[1], best[2])


Rule = Callable[[_Layer], tuple[int, int] | None]
RULES: Mapping[str, Sequence[Rule]] = {
    "experts": (_heaviest, _best_for_ranks),
    "ranks": (_best_for_ranks,),
}


def _low_experts(
    replicas: list[list[Replica]],
    importance_LE: FloatArray,
    topology: Topology,
    limits: ResidentLimits,
) -> np.ndarray | _Unpaid:
    """Whether each original is stored low, bool [L, E]; or the first rank that cannot pay."""
    per_rank, num_layers = topology.experts_per_rank, topology.num_layers
    free_LE = _may_be_low(replicas, importance_LE, limits.keep_share)
    low_LE = np.zeros(importance_LE.shape, dtype=bool)
    num_replicas_R = np.bincount(
        [copy.rank for copies in replicas for copy in copies], minlength=topology.num_ranks
    )
    before = num_layers * per_rank * limits.expert_bytes.high
    budget = int(limits.budget_share * before + 1e-6)
    saved = limits.expert_bytes.high - limits.expert_bytes.low
    for rank in range(topology.num_ranks):
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        need = before + int(num_replicas_R[rank]) * limits.expert_bytes.low - budget
        num_low = max(0, -(-need // saved)) if saved > 0 else 0
        order = np.argsort(importance_LE[:, mine], axis=None, kind="stable").tolist()
        chosen = _cheapest(order, free_LE[:, mine], num_low)
        if len(chosen) < num_low or (saved <= 0 < need):
            return _Unpaid(rank=rank, missing_bytes=need - len(chosen) * saved)
        for at in chosen:
            low_LE[at // per_rank, rank * per_rank + at % per_rank] = True
    return low_LE


def _cheapest(order: list[int], free_Le: np.ndarray, wanted: int) -> list[int]:
    """The first `wanted` places in `order` that are free; in each layer one is left high."""
    num_layers, per_rank = free_Le.shape
    left_L = [per_rank - 1] * num_layers
    chosen: list[int] = []
    for at in order:
        layer = at // per_rank
        if len(chosen) == wanted:
            break
        if free_Le.flat[at] and left_L[layer] > 0:
            left_L[layer] -= 1
            chosen.append(at)
    return chosen


def _may_be_low(
    replicas: list[list[Replica]], importance_LE: FloatArray, keep_share: float
) -> np.ndarray:
    num_experts = importance_LE.shape[1]
    num_kept = int(np.ceil(keep_share * num_experts - 1e-9))
    free_LE = np.ones(importance_LE.shape, dtype=bool)
    dearest_LE = np.argsort(-importance_LE, axis=1, kind="stable")[:, :num_kept]
    np.put_along_axis(free_LE, dearest_LE, False, axis=1)
    for number, copies in enumerate(replicas):
        free_LE[number, [copy.expert for copy in copies]] = False
    return free_LE


def _give_up_one(replicas: list[list[Replica]], rows_LE: IntArray, rank: int) -> bool:
    """Take the last replicas of one layer away, down to the last on `rank`; False if it has none.

    Whole tails, so that what is left is what the same rule makes with fewer copies.
    """
    ends = [
        max((at for at, copy in enumerate(copies) if copy.rank == rank), default=None)
        for copies in replicas
    ]
    left = [
        (_score(rows_LE[layer], copies[:end]), layer)
        for layer, (copies, end) in enumerate(zip(replicas, ends, strict=True))
        if end is not None
    ]
    if not left:
        return False
    layer = min(left)[1]
    del replicas[layer][ends[layer] :]
    return True


def _score(rows_E: IntArray, copies: list[Replica]) -> float:
    return float(lis(rows_E[None], (LayerPlacement(replicas=tuple(copies)),))[0])


def _refuse_budget(unpaid: _Unpaid, topology: Topology, limits: ResidentLimits) -> None:
    before = topology.num_layers * topology.experts_per_rank * limits.expert_bytes.high
    least = limits.budget_share + unpaid.missing_bytes / before
    raise PlacementError(
        f"budget {limits.budget_share:g} cannot be met on rank {unpaid.rank}, without replicas "
        f"even: {unpaid.missing_bytes} bytes are missing with a share of {limits.keep_share:g} "
        f"kept high. Use a budget of {min(least + 5e-4, 1.0):.3f} or more, or keep less high"
    )
