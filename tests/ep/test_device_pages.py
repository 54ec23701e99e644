"""Laws of memory mapped by the CUDA driver, with a driver that has the host's memory.

What this does not show: that the driver understands us. `tests/gpu/check_pull.py` does.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_moelb.ep.replicas import memory as module
from sglang_moelb.ep.replicas.device_pages import Access, DevicePages, Properties
from sglang_moelb.ep.replicas.host_pages import HostPages
from sglang_moelb.ep.replicas.memory import MappingError, map_experts

from .ranks import Ranks
from .test_replica_memory import NUM_LAYERS, NUM_SLOTS, SHAPES, Layer, both, expected

GRANULE = 2 << 20
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801

pytestmark = pytest.mark.dist


class HostDriver:
    """The driver's functions over `HostPages`, as ctypes calls them; `refuses` name: a status."""

    def __init__(self, refuses: dict[str, int]) -> None:
        self.pages, self.refuses = HostPages(), refuses
        self.accesses: list[tuple[int, int, int, int]] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("cuMem") and name in self.refuses:
            return lambda *args: self.refuses[name]
        return found

    def cuGetErrorName(self, status: int, name: Any) -> None:
        names = {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY"}
        name._obj.value = names.get(status, b"CUDA_ERROR_NOT_SUPPORTED")

    def cuMemGetAllocationGranularity(self, granule: Any, properties: Any, which: int) -> int:
        granule._obj.value = GRANULE
        return 0

    def cuMemCreate(self, handle: Any, num_bytes: int, properties: Any, flags: int) -> int:
        asked = properties._obj
        assert (asked.type, asked.handle_types, asked.location.type) == (1, 1, 1)
        assert num_bytes % GRANULE == 0
        handle._obj.value = self.pages.create(num_bytes)
        return 0

    def cuMemRelease(self, handle: int) -> int:
        self.pages.release(handle)
        return 0

    def cuMemAddressReserve(
        self, address: Any, num_bytes: int, alignment: int, wish: int, flags: int
    ) -> int:
        assert num_bytes % GRANULE == 0
        start = self.pages.reserve(num_bytes + alignment)
        address._obj.value = -(-start // alignment) * alignment
        return 0

    def cuMemMap(self, address: int, num_bytes: int, offset: int, handle: int, flags: int) -> int:
        assert (address % GRANULE, num_bytes % GRANULE, offset, flags) == (0, 0, 0, 0)
        self.pages.map(handle, num_bytes, address)
        return 0

    def cuMemSetAccess(self, address: int, num_bytes: int, access: Any, count: int) -> int:
        assert (access._obj.location.type, access._obj.flags, count) == (1, 3, 1)
        return 0

    def cuMemExportToShareableHandle(self, file: Any, handle: int, kind: int, flags: int) -> int:
        assert kind == 1
        file._obj.value = self.pages.to_file(handle)
        return 0

    def cuMemImportFromShareableHandle(self, handle: Any, file: int, kind: int) -> int:
        handle._obj.value = self.pages.to_file(file)  # who imports still has to close the file
        return 0


class Unsynchronised:
    """No device is there to wait for."""

    def __enter__(self) -> None:
        self.kept = torch.cuda.synchronize, torch.cuda.empty_cache, module._pages
        torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize, torch.cuda.empty_cache, module._pages = self.kept


def over_driver(group: dist.ProcessGroup, rank: int, refuses: dict[str, int]) -> str:
    layers = [Layer(rank, layer) for layer in range(NUM_LAYERS)]
    with Unsynchronised():
        driver = HostDriver(refuses if rank == 1 else {})
        module._pages = lambda device: DevicePages(device, driver)
        try:
            experts_of = map_experts(layers, num_slots=NUM_SLOTS, rank=rank, group=group)
        except MappingError as error:
            for number, layer in enumerate(layers):
                for name in SHAPES:
                    assert torch.equal(getattr(layer, name), expected(name, rank, number))
            return str(error)
    for number, experts in enumerate(experts_of):
        for name, whole, own_R in both(experts):
            own = own_R[rank]
            assert (own.data_ptr() + own.nbytes) % GRANULE == 0
            assert whole.data_ptr() == own.data_ptr() == getattr(layers[number], name).data_ptr()
            for peer, of_peer in enumerate(own_R):
                assert torch.equal(of_peer, expected(name, peer, number)), (name, peer)
            experts_of[0].w2[-1] = float(number)
            assert torch.equal(experts.w2[-1], experts_of[0].w2[-1])
    dist.barrier(group=group)
    return ""


def test_experts_end_where_a_granule_does_and_all_ranks_read_them(ranks: Ranks) -> None:
    assert ranks.run(over_driver, [{}] * 4) == [""] * 4


@pytest.mark.parametrize(
    ("function", "status", "told"),
    [
        ("cuMemCreate", OUT_OF_MEMORY, r"CUDA_ERROR_OUT_OF_MEMORY \(2\): .*use fewer slots"),
        ("cuMemImportFromShareableHandle", NOT_SUPPORTED, r"NOT_SUPPORTED \(801\): .*peers"),
        ("cuMemSetAccess", NOT_SUPPORTED, r"NOT_SUPPORTED \(801\): .*which needs GPUs of one host"),
    ],
)
def test_what_the_driver_refuses_is_told_on_all_ranks_and_nothing_has_moved(
    ranks: Ranks, function: str, status: int, told: str
) -> None:
    answers = ranks.run(over_driver, [{function: status}] * 2)
    assert answers[0] == answers[1]
    assert re.match(rf"rank 1: cpu: {function}: .*{told}", answers[0])


def test_the_structures_are_as_long_as_the_drivers() -> None:
    assert (ctypes.sizeof(Properties), ctypes.sizeof(Access)) == (32, 12)
    assert (Properties.location.offset, Properties.flags.offset) == (8, 24)
