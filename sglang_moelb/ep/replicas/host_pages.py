"""`Pages` of the host: files in memory without a name."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

from sglang_moelb.ep.replicas.pages import MappingError
from sglang_moelb.ep.replicas.raw_tensor import raw_tensor

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # Linux; Python's mmap has no use for the first
FAILED = ctypes.c_void_p(-1).value


class HostPages:
    """See `Pages`; a handle is an open file."""

    granule = mmap.PAGESIZE

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        )  # fmt: skip

    def create(self, num_bytes: int) -> int:
        """See `Pages`."""
        try:
            file = os.memfd_create("moelb-experts")
            os.truncate(file, num_bytes)
        except OSError as error:
            raise _refused(f"{num_bytes} bytes of shared memory", error) from error
        return file

    def reserve(self, num_bytes: int) -> int:
        """See `Pages`."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return self._checked(self._mmap(None, num_bytes, 0, flags, -1, 0), num_bytes)

    def map(self, handle: int, num_bytes: int, address: int) -> None:
        """See `Pages`."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | MAP_FIXED
        self._checked(self._mmap(address, num_bytes, access, flags, handle, 0), num_bytes)

    def release(self, handle: int) -> None:
        """See `Pages`."""
        os.close(handle)

    def to_file(self, handle: int) -> int:
        """See `Pages`."""
        try:
            return os.dup(handle)
        except OSError as error:
            raise _refused("one more open file", error) from error

    def from_file(self, file: int) -> int:
        """See `Pages`."""
        return file

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Pages`."""
        return raw_tensor(address, num_bytes, torch.device("cpu"))

    def settle(self) -> None:
        """See `Pages`: the host does everything at once."""

    def _checked(self, address: int | None, num_bytes: int) -> int:
        if address is None or address == FAILED:
            error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            raise _refused(f"addresses for {num_bytes} bytes", error)
        return address


def _refused(what: str, error: OSError) -> MappingError:
    return MappingError(
        f"the host does not give {what}: {error.strerror}; see `ulimit -n`, `ulimit -v` and free "
        "memory, or use fewer slots"
    )
