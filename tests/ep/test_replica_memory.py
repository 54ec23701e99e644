"""Laws of experts that all ranks of a host map: whose they are, where they lie, what they cost.

Shape letters: R ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sglang_moelb.ep.replicas import exchange_files as files_module
from sglang_moelb.ep.replicas import memory as module
from sglang_moelb.ep.replicas.host_pages import HostPages
from sglang_moelb.ep.replicas.memory import LayerExperts, MappingError, map_experts

from .ranks import Ranks

NUM_LAYERS, NUM_OWN, NUM_SLOTS = 3, 4, 2
SHAPES = {"w13_weight": (NUM_OWN, 24, 40), "w2_weight": (NUM_OWN, 40, 12)}  # no multiple of a page


pytestmark = pytest.mark.dist


class Layer(torch.nn.Module):
    """The parameters of a layer of SGLang, which carry attributes of their own."""

    def __init__(self, rank: int, layer: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            value = expected(name, rank, layer, dtype).reshape(shape)
            parameter = torch.nn.Parameter(value, requires_grad=False)
            parameter.weight_loader = ("loader", rank, layer)  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


def expected(name: str, rank: int, layer: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    seed = 1000 * rank + 10 * layer + (name == "w2_weight")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def mapped(
    group: dist.ProcessGroup, rank: int, num_slots: int = NUM_SLOTS, dtype: Any = torch.bfloat16
) -> tuple[list[Layer], list[LayerExperts]]:
    layers = [Layer(rank, layer, dtype) for layer in range(NUM_LAYERS)]
    return layers, map_experts(layers, num_slots=num_slots, rank=rank, group=group)


def both(experts: LayerExperts) -> list[tuple[str, Tensor, tuple[Tensor, ...]]]:
    return [
        ("w13_weight", experts.w13, experts.w13_R),
        ("w2_weight", experts.w2, experts.w2_R),
    ]


def read_all(group: dist.ProcessGroup, rank: int, payload: tuple[int, Any]) -> None:
    num_slots, dtype = payload
    layers, experts_of = mapped(group, rank, num_slots, dtype)
    for number, (layer, experts) in enumerate(zip(layers, experts_of, strict=True)):
        for name, whole, own_R in both(experts):
            assert whole.shape == (NUM_OWN + num_slots, *SHAPES[name][1:])
            assert whole.is_contiguous()
            assert whole.data_ptr() % module.ALIGN_BYTES == 0
            assert not whole[NUM_OWN:].any()
            parameter = getattr(layer, name)
            assert parameter.data_ptr() == whole.data_ptr() == own_R[rank].data_ptr()
            assert parameter.weight_loader == ("loader", rank, number)
            assert parameter.dtype == dtype
            assert dict(layer.named_parameters())[name] is parameter
            for peer, own in enumerate(own_R):
                assert torch.equal(own, expected(name, peer, number, dtype)), (name, peer)
    dist.barrier(group=group)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("num_slots", "dtype"), [(NUM_SLOTS, torch.bfloat16), (9, torch.float32), (0, torch.bfloat16)]
)
def test_every_rank_reads_every_experts_weights_and_parameters_keep_what_they_carry(
    ranks: Ranks, num_ranks: int, num_slots: int, dtype: torch.dtype
) -> None:
    ranks.run(read_all, [(num_slots, dtype)] * num_ranks)


def write_slots(group: dist.ProcessGroup, rank: int, _: None) -> None:
    _, experts_of = mapped(group, rank)
    for writer in range(NUM_LAYERS):
        for number in range(2):
            _, whole, _ = both(experts_of[writer])[number]
            whole[NUM_OWN:] = 10.0 * writer + rank + 1
            for reader in experts_of:
                assert torch.equal(both(reader)[number][1][NUM_OWN:], whole[NUM_OWN:])
    dist.barrier(group=group)
    for layer, experts in enumerate(experts_of):  # no write went beyond the slots
        for name, _, own_R in both(experts):
            for peer, own in enumerate(own_R):
                assert torch.equal(own, expected(name, peer, layer))
        assert torch.equal(experts.w13[-1, 0], torch.full((40,), 20.0 + rank + 1).bfloat16())
    dist.barrier(group=group)


def test_all_layers_see_one_set_of_slots_and_no_rank_those_of_another(ranks: Ranks) -> None:
    ranks.run(write_slots, [None] * 4)


def update_weights(group: dist.ProcessGroup, rank: int, _: None) -> None:
    layers, experts_of = mapped(group, rank)
    layers[1].w13_weight.data.copy_(expected("w13_weight", rank + 50, 1))
    dist.barrier(group=group)
    for peer, own in enumerate(experts_of[1].w13_R):
        assert torch.equal(own, expected("w13_weight", peer + 50, 1))
    dist.barrier(group=group)


def test_what_is_loaded_into_a_parameter_is_what_peers_read(ranks: Ranks) -> None:
    ranks.run(update_weights, [None] * 2)


def count_bytes(group: dist.ProcessGroup, rank: int, _: None) -> tuple[int, int, int]:
    before = resident_bytes()
    mapped(group, rank, num_slots=1)
    between = resident_bytes()
    _, many = mapped(group, rank, num_slots=4 << 8)
    for experts in many:
        experts.w13[NUM_OWN:] = 1.0
        experts.w2[NUM_OWN:] = 1.0
    return between - before, resident_bytes() - between, many[0].slots_bytes


def resident_bytes() -> int:
    """Shared memory that this process made and that is mapped, each page once."""
    made = 0
    for line in open("/proc/self/smaps"):  # noqa: SIM115, PTH123 - a file of the kernel
        if line.startswith("Pss:"):
            made += int(line.split()[1]) << 10
    return made


def test_slots_cost_their_memory_once_however_many_layers_there_are(ranks: Ranks) -> None:
    expert_bytes = 2 * (24 * 40 + 40 * 12)
    for few, many, slots_bytes in ranks.run(count_bytes, [None] * 2):
        assert slots_bytes == (4 << 8) * expert_bytes
        assert few < slots_bytes / 2
        assert slots_bytes * 0.9 < many < slots_bytes * 1.5


def count_files(group: dist.ProcessGroup, rank: int, _: None) -> int:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    mapped(group, rank)
    return len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208


def test_no_file_stays_open(ranks: Ranks) -> None:
    assert ranks.run(count_files, [None] * 4) == [0] * 4


def refused(
    group: dist.ProcessGroup, rank: int, patch: Callable[[int], list[Layer]]
) -> tuple[str, bool]:
    """The error, and whether the layers hold what they held and no file stays open."""
    kept = files_module._host, HostPages.create, HostPages.to_file, HostPages.map
    num_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    layers = patch(rank)
    try:
        map_experts(layers, num_slots=NUM_SLOTS, rank=rank, group=group)
    except MappingError as error:
        fine = all(
            torch.equal(getattr(layer, name), expected(name, rank, number))
            for number, layer in enumerate(layers)
            for name in SHAPES
        )
        num_left = len(os.listdir("/proc/self/fd")) - num_files  # noqa: PTH208
        return str(error), fine and num_left == 0
    finally:
        files_module._host, HostPages.create, HostPages.to_file, HostPages.map = kept  # type: ignore
    return "", True


def another_host(rank: int) -> list[Layer]:
    files_module._host = lambda: f"host{rank // 2} boot"
    return [Layer(rank, layer) for layer in range(NUM_LAYERS)]


def no_memory_for_layer_1(rank: int) -> list[Layer]:
    create, num_made = HostPages.create, 0

    def counted(pages: HostPages, num_bytes: int) -> int:
        nonlocal num_made
        num_made += 1
        if rank == 1 and num_made == 6:  # the mark, two of slots, two of layer 0
            raise MappingError("no memory")
        return create(pages, num_bytes)

    HostPages.create = counted  # type: ignore[method-assign]
    return [Layer(rank, layer) for layer in range(NUM_LAYERS)]


def no_file_of_a_block(rank: int) -> list[Layer]:
    to_file, num_made = HostPages.to_file, 0

    def counted(pages: HostPages, handle: int) -> int:
        nonlocal num_made
        num_made += 1
        if rank == 1 and num_made == 3:  # the mark, then the first of a layer
            raise MappingError("no more open files")
        return to_file(pages, handle)

    HostPages.to_file = counted  # type: ignore[method-assign]
    return [Layer(rank, layer) for layer in range(NUM_LAYERS)]


def no_addresses_for_a_peers_block(rank: int) -> list[Layer]:
    map_pages, num_mapped = HostPages.map, 0

    def counted(pages: HostPages, handle: int, num_bytes: int, address: int) -> None:
        nonlocal num_mapped
        num_mapped += 1
        if rank == 1 and num_mapped == 18:  # four marks, twelve own, the second of a peer
            raise MappingError("no addresses")
        map_pages(pages, handle, num_bytes, address)

    HostPages.map = counted  # type: ignore[method-assign]
    return [Layer(rank, layer) for layer in range(NUM_LAYERS)]


def odd_layer(rank: int) -> list[Layer]:
    layers = [Layer(rank, layer) for layer in range(NUM_LAYERS)]
    if rank == 1:
        layers[2].w2_weight = torch.nn.Parameter(
            layers[2].w2_weight.data.float(), requires_grad=False
        )
    return layers


@pytest.mark.parametrize(
    ("patch", "told"),
    [
        (another_host, "rank 0: rank 0 is on host host0 and rank 2 on host1: .*use one host"),
        (no_memory_for_layer_1, "rank 1: no memory"),
        (no_file_of_a_block, "rank 1: no more open files"),
        (no_addresses_for_a_peers_block, "rank 1: no addresses"),
        (odd_layer, "rank 1: w2_weight differs between layers"),
    ],
)
def test_what_one_rank_cannot_do_is_refused_on_all_and_layers_stay_usable_and_no_handle_is_left(
    ranks: Ranks, patch: Callable[[int], list[Layer]], told: str
) -> None:
    answers = ranks.run(refused, [patch] * 4)
    assert len({error for error, _ in answers}) == 1
    assert re.match(told, answers[0][0])
    if patch is not odd_layer:
        assert all(fine for _, fine in answers)
