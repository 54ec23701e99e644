"""The placement file: which experts have resident replicas, and which weights are stored low.

Written by `moelb calibrate`, read by a server at start (`resident.placement`). An expert's original
stays on the rank where it is loaded, in blocks of E/R. A replica is always stored at low precision.

Shape letters: L MoE layers, E logical experts, R ranks, C most copies of an expert in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from sglang_moelb.stored_formats import refusal_of
from sglang_moelb.types import IntArray, Topology

SCHEMA = "sglang_moelb.placement"
VERSION = 1

AIMS = ("experts", "ranks")  # what replicas are to lower: the busiest copy, or the busiest rank

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class PlacementError(ValueError):
    """A placement cannot be made, read or used; the message names what and the fix."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Sizes(_Part, frozen=True):
    """The model's sizes that a placement is for."""

    num_layers: Positive
    num_experts: Positive
    num_ranks: Positive
    topk: Positive

    @property
    def topology(self) -> Topology:
        """The same as the package's noun."""
        return Topology(**msgspec.structs.asdict(self))


class ExpertBytes(_Part, frozen=True):
    """What one expert takes in memory, both projections, at either precision."""

    high: Positive
    low: Positive


class Replica(_Part, frozen=True):
    """A further copy of `expert` on `rank`, which is not its home."""

    expert: Count
    rank: Count


class LayerPlacement(_Part, frozen=True):
    """One MoE layer: its replicas, and the originals stored low, equally many on all ranks."""

    replicas: tuple[Replica, ...] = ()
    low_experts: tuple[Count, ...] = ()


class LoadFigures(_Part, frozen=True):
    """Load by layer, of the rows of all passes together unless said.

    `lis` is R&Q's load-imbalance score, E times the rows of the busiest copy over all rows;
    `rank_balance` max/mean rows of the ranks; `pass_balance` its mean over single passes.
    """

    lis: list[float]
    rank_balance: list[float]
    pass_balance: list[float]


class Expected(_Part, frozen=True):
    """What the placement does to the passes that it was not made from, with an even split.

    `same_passes`: there were none, so the figures are of those it was made from.
    """

    num_passes: Count
    same_passes: bool
    before: LoadFigures
    after: LoadFigures


class RankMemory(_Part, frozen=True):
    """Bytes of all experts' weights on each rank."""

    before: list[int]
    after: list[int]


class Origin(_Part, frozen=True):
    """What a placement was made from."""

    trace: str
    num_passes: Positive  # calibrated on
    num_passes_read: Positive
    importance: str
    aim: str
    model: str


class Placement(_Part, frozen=True):
    """The whole file."""

    schema: str
    version: int
    format: str
    sizes: Sizes
    expert_bytes: ExpertBytes
    layers: tuple[LayerPlacement, ...]
    memory: RankMemory
    expected: Expected | None = None
    origin: Origin | None = None

    def to_json(self) -> bytes:
        """The file's text; `decode` is its inverse."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLayout:
    """Where a layer's copies lie.

    A rank has `num_places` places: its high originals, its low originals, its replicas, each in
    ascending order, and nothing in what is left. Physical id = rank * num_places + place.
    `copies_EC` are an expert's physical ids, its original first, then by rank, the first
    `num_copies_E` of each row; the rest of a row is -1.
    """

    num_places: int
    high: tuple[tuple[int, ...], ...]  # by rank, logical experts
    low: tuple[tuple[int, ...], ...]
    replicas: tuple[tuple[int, ...], ...]
    copies_EC: IntArray
    num_copies_E: IntArray


def decode(raw: bytes, name: str) -> Placement:
    """Read a placement and check it. Raises `PlacementError` that begins with `name`."""
    try:
        tree: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"{name}: not JSON ({error}); make it with moelb calibrate") from error
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        raise PlacementError(f"{name}: not a placement ({SCHEMA}); make it with moelb calibrate")
    if tree.get("version") != VERSION:
        raise PlacementError(
            f"{name}: version {tree.get('version')}, this package reads version {VERSION}; make it "
            "anew with moelb calibrate"
        )
    try:
        placement = msgspec.convert(tree, Placement)
        check(placement)
    except (msgspec.ValidationError, PlacementError) as error:
        raise PlacementError(f"{name}: {error}") from error
    return placement


def load(path: Path) -> Placement:
    """Read the file at `path`. Raises `PlacementError`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PlacementError(
            f"{path}: cannot be read ({error.strerror}). Give what moelb calibrate wrote."
        ) from error
    return decode(raw, str(path))


def check(placement: Placement) -> None:
    """Raise `PlacementError` where a placement contradicts itself or its sizes."""
    sizes, layers = placement.sizes, placement.layers
    if fix := refusal_of(placement.format):
        raise PlacementError(f"format {placement.format!r}: {fix}")
    if sizes.num_experts % sizes.num_ranks or sizes.topk > sizes.num_experts:
        raise PlacementError(f"{sizes}: experts must divide evenly over ranks and be top-k or more")
    if len(layers) != sizes.num_layers:
        raise PlacementError(f"{len(layers)} layers, sizes.num_layers says {sizes.num_layers}")
    num_low = len(layers[0].low_experts) // sizes.num_ranks
    for number, layer in enumerate(layers):
        problem = _problem(layer, sizes, num_low)
        if problem:
            raise PlacementError(f"layer {number}: {problem}")
    told = (placement.memory.before, placement.memory.after)
    if told != (found := memory_of(layers, sizes.topology, placement.expert_bytes)):
        raise PlacementError(f"memory is {told}, its layers take {found}")
    for rank, (before, after) in enumerate(zip(*told, strict=True)):
        if after > before:
            raise PlacementError(f"rank {rank}: experts take {after} bytes, more than {before} now")


def _problem(layer: LayerPlacement, sizes: Sizes, num_low: int) -> str:
    per_rank = sizes.num_experts // sizes.num_ranks
    copies = [(replica.expert, replica.rank) for replica in layer.replicas]
    low = layer.low_experts
    for expert, rank in copies:
        if expert >= sizes.num_experts or rank >= sizes.num_ranks:
            return f"replica of expert {expert} on rank {rank}, which are not there"
        if rank == expert // per_rank:
            return f"replica of expert {expert} on rank {rank}, its home"
    if len(set(copies)) < len(copies) or len(set(low)) < len(low):
        return "an expert is named twice"
    if low and max(low) >= sizes.num_experts:
        return f"low expert {max(low)} of {sizes.num_experts}"
    both = {expert for expert, _ in copies} & set(low)
    if both:
        return f"expert {min(both)} has a replica, so its original must stay at high precision"
    homes = np.bincount(np.array(low, dtype=int) // per_rank, minlength=sizes.num_ranks)
    if (homes >= per_rank).any():
        return f"rank {int(homes.argmax())} has no expert left at high precision"
    if (homes != num_low).any():
        return (
            f"its ranks store {homes.tolist()} experts low; it must be {num_low} on each, as "
            "everywhere, for one grouped GEMM"
        )
    return ""


def num_slots_of(layers: tuple[LayerPlacement, ...], num_ranks: int) -> int:
    """Places for replicas on every rank in every layer: the most that one needs."""
    return max(
        sum(replica.rank == rank for replica in layer.replicas)
        for layer in layers
        for rank in range(num_ranks)
    )


def memory_of(
    layers: tuple[LayerPlacement, ...], topology: Topology, expert_bytes: ExpertBytes
) -> tuple[list[int], list[int]]:
    """Bytes of experts on each rank, before and after; places without a replica take theirs too.

    Every rank stores equally many experts low in every layer, see `check`.
    """
    per_rank, num_ranks = topology.experts_per_rank, topology.num_ranks
    num_low = len(layers[0].low_experts) // num_ranks
    num_places_low = num_low + num_slots_of(layers, num_ranks)
    high, low = expert_bytes.high, expert_bytes.low
    after = len(layers) * ((per_rank - num_low) * high + num_places_low * low)
    return [len(layers) * per_rank * high] * num_ranks, [after] * num_ranks


def layout(layer: LayerPlacement, topology: Topology, num_slots: int) -> LayerLayout:
    """Where the copies of a layer lie, with `num_slots` places for replicas on each rank.

    Example: 4 experts on 2 ranks, a slot each, expert 0 replicated on rank 1, experts 1 and 3 low.
    Rank 0 has the places (0, 1 low, nothing), rank 1 (2, 3 low, 0 low); expert 0 has the physical
    ids 0 and 5.
    """
    num_ranks, per_rank = topology.num_ranks, topology.experts_per_rank
    low = set(layer.low_experts)
    own = [range(rank * per_rank, (rank + 1) * per_rank) for rank in range(num_ranks)]
    high_R = tuple(tuple(expert for expert in owned if expert not in low) for owned in own)
    low_R = tuple(tuple(expert for expert in owned if expert in low) for owned in own)
    replicas_R = tuple(
        tuple(sorted(replica.expert for replica in layer.replicas if replica.rank == rank))
        for rank in range(num_ranks)
    )
    num_places = per_rank + num_slots
    homes: list[list[int]] = [[] for _ in range(topology.num_experts)]
    others: list[list[int]] = [[] for _ in range(topology.num_experts)]
    for rank in range(num_ranks):
        first = rank * num_places
        for place, expert in enumerate(high_R[rank] + low_R[rank]):
            homes[expert].append(first + place)
        for slot, expert in enumerate(replicas_R[rank]):
            others[expert].append(first + per_rank + slot)
    copies = [home + other for home, other in zip(homes, others, strict=True)]
    num_copies_E = np.array([len(ids) for ids in copies])
    copies_EC = np.full((len(copies), int(num_copies_E.max())), -1)
    for expert, ids in enumerate(copies):
        copies_EC[expert, : len(ids)] = ids
    return LayerLayout(
        num_places=num_places,
        high=high_R,
        low=low_R,
        replicas=replicas_R,
        copies_EC=copies_EC,
        num_copies_E=num_copies_E,
    )
