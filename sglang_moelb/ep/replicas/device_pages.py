"""`Pages` of a CUDA device: virtual memory management of its driver, without multicast.

By ctypes, because PyTorch does not bring Python bindings of the driver everywhere. Interface:
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from sglang_moelb.ep.replicas.pages import MappingError
from sglang_moelb.ep.replicas.raw_tensor import raw_tensor

PINNED, ON_DEVICE, POSIX_FILE, READ_WRITE, MINIMUM = 1, 1, 1, 3, 0
OUT_OF_MEMORY = 2
FUNCTIONS = {
    "cuMemGetAllocationGranularity": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    "cuMemCreate": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64),
    "cuMemRelease": (ctypes.c_uint64,),
    "cuMemAddressReserve": (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64,
    ),
    "cuMemMap": (
        ctypes.c_uint64, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64,
    ),
    "cuMemSetAccess": (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
    "cuMemExportToShareableHandle": (
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64,
    ),
    "cuMemImportFromShareableHandle": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    "cuGetErrorName": (ctypes.c_int, ctypes.c_void_p),
}  # fmt: skip


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class DevicePages:
    """See `Pages`; a handle is a CUmemGenericAllocationHandle.

    Driven by one thread, in which PyTorch has made the device's context current.
    """

    def __init__(self, device: torch.device, driver: Any | None = None) -> None:
        """`driver` is the loaded library, by default the one that is installed."""
        self._driver = driver or _load()
        self._device = device
        self._location = Location(ON_DEVICE, device.index or 0)
        self._properties = Properties(
            type=PINNED, handle_types=POSIX_FILE, location=self._location
        )
        torch.cuda.synchronize(device)
        granule = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granule), ctypes.byref(self._properties), MINIMUM,
        )  # fmt: skip
        self.granule = granule.value
        torch.cuda.empty_cache()  # what PyTorch keeps for itself is memory that we may need

    def create(self, num_bytes: int) -> int:
        """See `Pages`."""
        handle = ctypes.c_uint64()
        properties = ctypes.byref(self._properties)
        self._call("cuMemCreate", ctypes.byref(handle), num_bytes, properties, 0)
        return handle.value

    def reserve(self, num_bytes: int) -> int:
        """See `Pages`."""
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), num_bytes, self.granule, 0, 0)
        return address.value

    def map(self, handle: int, num_bytes: int, address: int) -> None:
        """See `Pages`."""
        access = Access(self._location, READ_WRITE)
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)
        self._call("cuMemSetAccess", address, num_bytes, ctypes.byref(access), 1)

    def release(self, handle: int) -> None:
        """See `Pages`."""
        self._call("cuMemRelease", handle)

    def to_file(self, handle: int) -> int:
        """See `Pages`."""
        file = ctypes.c_int()
        self._call("cuMemExportToShareableHandle", ctypes.byref(file), handle, POSIX_FILE, 0)
        return file.value

    def from_file(self, file: int) -> int:
        """See `Pages`."""
        handle = ctypes.c_uint64()
        try:
            self._call("cuMemImportFromShareableHandle", ctypes.byref(handle), file, POSIX_FILE)
        finally:
            os.close(file)
        return handle.value

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Pages`."""
        return raw_tensor(address, num_bytes, self._device)

    def settle(self) -> None:
        """See `Pages`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._driver, name)(*args)
        if status:
            raise MappingError(f"{self._device}: {name}: {self._name_of(status)}: {_fix(status)}")

    def _name_of(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._driver.cuGetErrorName(status, ctypes.byref(name))
        return (name.value or b"?").decode() + f" ({status})"


def _load() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name, types in FUNCTIONS.items():
            getattr(driver, name).argtypes = types
    except (OSError, AttributeError) as error:
        raise MappingError(f"no CUDA driver that maps memory: {error}; install a newer") from error
    return driver


def _fix(status: int) -> str:
    if status == OUT_OF_MEMORY:
        return (
            "no memory for the slots and for one layer more while layers are moved; use fewer "
            "slots, or more ranks"
        )
    return (
        "experts are read from peers' memory, which needs GPUs of one host that reach each other "
        "(nvidia-smi topo -p2p r), all visible to every rank"
    )
