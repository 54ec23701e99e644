"""Expert weights where every rank of the host reads them, each followed by room for copies.

One contiguous tensor holds a layer's own experts and the slots, as one grouped run wants them; the
slots are one memory that all layers see behind their own experts. Own experts end where a page of
the device ends, so their tensor begins somewhere inside its first page:

    addresses | pad | own experts of layer 0 | slots |   | pad | own experts of layer 1 | slots |
    memory    |  layer 0, mapped by peers    |   S   |   |  layer 1, mapped by peers    |   S   |

Shape letters: R ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sglang_moelb.ep.expert_rows import WEIGHTS
from sglang_moelb.ep.replicas.device_pages import DevicePages
from sglang_moelb.ep.replicas.exchange_files import exchange_files
from sglang_moelb.ep.replicas.host_pages import HostPages
from sglang_moelb.ep.replicas.pages import MappingError, Pages, rounded_up

logger = logging.getLogger("sglang_moelb")

__all__ = ["LayerExperts", "MappingError", "map_experts"]

ALIGN_BYTES = 16  # of what is copied in words, and of what DeepGEMM reads by TMA
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExperts:
    """Weights of one MoE layer, `[E/R + S, ...]`: own experts, then the slots.

    `w13_R` and `w2_R` are each rank's own experts `[E/R, ...]` in its memory, to be read only; this
    rank's entry is the first part of `w13` and `w2`. The slots are the same memory in all layers.
    """

    w13: Tensor
    w2: Tensor
    w13_R: tuple[Tensor, ...]
    w2_R: tuple[Tensor, ...]

    @property
    def num_own(self) -> int:
        """E/R, the experts of this rank."""
        return len(self.w13_R[0])

    @property
    def slots_bytes(self) -> int:
        """Memory of the slots, which all layers share."""
        return self.w13[self.num_own :].nbytes + self.w2[self.num_own :].nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Memory that ends with the experts `own`; `whole` are those and the slots behind them."""

    handle: int
    handle_bytes: int
    own: Tensor
    whole: Tensor


def map_experts(
    layers: Sequence[Any], *, num_slots: int, rank: int, group: dist.ProcessGroup
) -> list[LayerExperts]:
    """Move the experts of SGLang's MoE `layers` to where all ranks map them, with slots behind.

    Afterwards `layer.w13_weight.data` and `layer.w2_weight.data` are the first E/R places of `w13`
    and `w2`; the parameters and their attributes stay. Layer by layer, so that one more layer than
    before is held at most. Slots are filled with zeros. Nothing is ever unmapped.

    Args:
        layers: equal in shape and dtype, on one device; on CPU or CUDA.
        num_slots: S, at least 0.
        rank: this process's in `group`.
        group: of gloo; every rank comes here with equal layers and slots.

    Raises:
        MappingError: on all ranks alike, where one of them cannot: ranks on several hosts, no peer
            access, no memory. Layers stay usable; if memory ended on the way, some have moved.
    """
    pages = _agreed(group, lambda: _pages(layers[0].w13_weight.device))
    _agreed(group, lambda: _check_layers(layers))
    _try_peers(pages, rank, group)
    blocks: list[tuple[_Block, ...]] = []
    with _handles(pages) as made:
        slots = _agreed(
            group, lambda: [_slots(pages, layers[0], name, num_slots, made) for name in WEIGHTS]
        )
        try:
            _agreed(group, lambda: _move(pages, layers, slots, num_slots, blocks, made))
            flat = [one for pair in blocks for one in pair]
            peers_R = _mapped_by_peers(pages, flat, rank, group)
        except MappingError:
            logger.warning(
                "sglang_moelb: %d layers have moved; %d bytes of slots stay mapped behind them",
                len(blocks),
                sum(num_bytes for _, num_bytes in slots) if blocks else 0,
            )
            raise
    return [
        LayerExperts(
            w13=w13.whole,
            w2=w2.whole,
            w13_R=tuple(of_rank[2 * layer] for of_rank in peers_R),
            w2_R=tuple(of_rank[2 * layer + 1] for of_rank in peers_R),
        )
        for layer, (w13, w2) in enumerate(blocks)
    ]


@contextmanager
def _handles(pages: Pages) -> Iterator[list[int]]:
    """A list of handles that are given back at the end, however it comes; what is mapped stays."""
    made: list[int] = []
    try:
        yield made
    finally:
        for handle in made:
            pages.release(handle)


def _pages(device: torch.device) -> Pages:
    return DevicePages(device) if device.type == "cuda" else HostPages()


def _agreed(group: dist.ProcessGroup, step: Callable[[], Result]) -> Result:
    """What `step` returns here; MappingError on all ranks if it raised one on any."""
    result, error = None, ""
    try:
        result = step()
    except MappingError as raised:
        error = str(raised)
    errors_R = [""] * dist.get_world_size(group)
    dist.all_gather_object(errors_R, error, group=group)
    for rank, told in enumerate(errors_R):
        if told:
            raise MappingError(f"rank {rank}: {told}")
    return result  # type: ignore[return-value]


def _check_layers(layers: Sequence[Any]) -> None:
    for name in WEIGHTS:
        kinds = {
            (tuple(weight.shape), weight.dtype, weight.device)
            for weight in (getattr(layer, name) for layer in layers)
        }
        if len(kinds) != 1:
            raise MappingError(
                f"{name} differs between layers: {sorted(map(str, kinds))}; slots that all layers "
                "share need layers of one shape"
            )
        expert = getattr(layers[0], name)[0]
        if expert.nbytes % ALIGN_BYTES:
            raise MappingError(
                f"an expert of {expert.nbytes} bytes in {name} is no multiple of {ALIGN_BYTES}"
            )


def _try_peers(pages: Pages, rank: int, group: dist.ProcessGroup) -> None:
    """Read a mark of every peer, so that what cannot work is told before anything has moved."""
    like = torch.full((1, pages.granule), rank + 1, dtype=torch.uint8)
    with _handles(pages) as made:
        marked = _agreed(group, lambda: _block(pages, like, (0, 0), 0, made))
        pages.settle()
        seen_R = _mapped_by_peers(pages, [marked], rank, group)

    def check() -> None:
        for peer, (seen,) in enumerate(seen_R):
            marks = {int(seen[0, 0]), int(seen[0, -1])}
            if marks != {peer + 1}:
                raise MappingError(f"mapped memory of rank {peer} reads {marks}, not {peer + 1}")

    _agreed(group, check)


def _slots(
    pages: Pages, layer: Any, name: str, num_slots: int, made: list[int]
) -> tuple[int, int]:
    """Handle and bytes of the memory of one projection's slots; 0 and 0 for no slots."""
    num_bytes = rounded_up(num_slots * getattr(layer, name)[0].nbytes, pages.granule)
    return (_create(pages, num_bytes, made) if num_bytes else 0), num_bytes


def _create(pages: Pages, num_bytes: int, made: list[int]) -> int:
    made.append(pages.create(num_bytes))
    return made[-1]


def _move(
    pages: Pages,
    layers: Sequence[Any],
    slots: Sequence[tuple[int, int]],
    num_slots: int,
    blocks: list[tuple[_Block, ...]],
    made: list[int],
) -> None:
    """Both projections of each layer to new memory, slots mapped behind, into `blocks`.

    Frees the old memory layer by layer.
    """
    for layer in layers:
        of_layer = []
        for name, of_name in zip(WEIGHTS, slots, strict=True):
            parameter = getattr(layer, name)
            block = _block(pages, parameter.data, of_name, num_slots, made)
            parameter.data = block.own
            of_layer.append(block)
        pages.settle()
        blocks.append(tuple(of_layer))


def _block(
    pages: Pages, experts: Tensor, slots: tuple[int, int], num_slots: int, made: list[int]
) -> _Block:
    """A copy of `experts` that ends where a page does, and the memory `slots` behind it."""
    handle_bytes = rounded_up(experts.nbytes, pages.granule)
    handle = _create(pages, handle_bytes, made)
    slots_handle, slots_bytes = slots
    address = pages.reserve(handle_bytes + slots_bytes)
    pages.map(handle, handle_bytes, address)
    if slots_bytes:
        pages.map(slots_handle, slots_bytes, address + handle_bytes)
    start = address + handle_bytes - experts.nbytes
    whole = pages.tensor(start, experts.nbytes + num_slots * experts[0].nbytes)
    whole = whole.view(experts.dtype).view(-1, *experts.shape[1:])
    own = whole[: len(experts)]
    own.copy_(experts)
    whole[len(experts) :].zero_()
    return _Block(handle=handle, handle_bytes=handle_bytes, own=own, whole=whole)


def _mapped_by_peers(
    pages: Pages, blocks: Sequence[_Block], rank: int, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """The own experts of every rank's `blocks`, by rank."""
    seen_R = [[block.own for block in blocks] for _ in range(dist.get_world_size(group))]
    refused: list[MappingError] = []

    def take(peer: int, files: list[int]) -> None:
        left = iter(files)
        try:
            seen_R[peer] = [
                _peers(pages, file, block) for file, block in zip(left, blocks, strict=True)
            ]
        except MappingError as error:
            refused.append(error)  # told when no peer waits for this rank any more
        finally:
            for file in left:
                os.close(file)

    files: list[int] = []

    def export() -> None:
        for block in blocks:
            files.append(pages.to_file(block.handle))

    def exchange() -> None:
        exchange_files(files, group, take)
        if refused:
            raise refused[0]

    try:
        # The exchange has collectives of its own: all ranks come to it or none.
        _agreed(group, export)
        _agreed(group, exchange)
    finally:
        for file in files:
            os.close(file)
    return seen_R


def _peers(pages: Pages, file: int, like: _Block) -> Tensor:
    """The experts behind `file`, which lie in their memory as `like.own` lies in its own."""
    with _handles(pages) as made:
        made.append(pages.from_file(file))
        address = pages.reserve(like.handle_bytes)
        pages.map(made[0], like.handle_bytes, address)
    start = address + like.handle_bytes - like.own.nbytes
    return pages.tensor(start, like.own.nbytes).view(like.own.dtype).view(like.own.shape)
