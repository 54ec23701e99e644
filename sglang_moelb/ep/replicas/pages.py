"""Memory that is mapped at addresses of our choosing and that other ranks can map too.

What CUDA calls virtual memory management, as an interface: physical memory is one thing, the
addresses at which it is seen are another, and one memory may be seen at several.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class MappingError(RuntimeError):
    """Memory of experts that cannot be mapped: the reason, and what to do about it."""


class Pages(Protocol):
    """Memory of one device. All sizes are multiples of `granule` bytes, addresses too.

    Every method raises `MappingError` where the device refuses. What is mapped stays so until the
    process ends, because graphs, kernels and peers hold its addresses.
    """

    granule: int

    def create(self, num_bytes: int) -> int:
        """New physical memory; a handle of it."""

    def reserve(self, num_bytes: int) -> int:
        """A range of addresses with nothing behind them; where it begins."""

    def map(self, handle: int, num_bytes: int, address: int) -> None:
        """Let all of the memory be seen at `address` of a reserved range."""

    def release(self, handle: int) -> None:
        """Give the handle back; the memory lives as long as it is mapped anywhere."""

    def to_file(self, handle: int) -> int:
        """An open file by which another process of this host gets the memory."""

    def from_file(self, file: int) -> int:
        """A handle of the memory behind the file of another process; closes the file."""

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """The bytes from `address` on as uint8, on this device whoever's memory it is."""

    def settle(self) -> None:
        """Wait until all has been written that was begun, and free what nobody holds any more."""


def rounded_up(num_bytes: int, granule: int) -> int:
    """`num_bytes` up to the next multiple of `granule`."""
    return -(-num_bytes // granule) * granule
