"""The formats that experts can be stored in at low precision, and what one expert then takes.

`ep/resident/formats.py` computes on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

MULTIPLE = 128  # of hidden and expert size: fp8's blocks, and the tiles of the 4-bit kernel
_NO_KERNEL = "no kernel that is used here computes on it as stored; use mxfp4 for 4 bits, or fp8"

# Bytes of so many weights, scales included.
LOW_BYTES: Mapping[str, Callable[[int], int]] = {
    "fp8": lambda num_weights: num_weights + 4 * num_weights // 128**2,  # float32 of 128x128
    "mxfp4": lambda num_weights: num_weights // 2 + num_weights // 32,  # a byte of 32
}
NOT_STORED: Mapping[str, str] = {"nvfp4": _NO_KERNEL, "int4": _NO_KERNEL}


def refusal_of(name: str) -> str:
    """Why experts cannot be stored in format `name`, and the fix; "" where they can."""
    if name in LOW_BYTES:
        return ""
    return NOT_STORED.get(name, f"use one of {', '.join(LOW_BYTES)}")
