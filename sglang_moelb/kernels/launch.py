"""Launches a Triton kernel without looking up again what Triton looked up at the first launch.

`kernel[grid](...)` specialises on every argument, spells all options out and compares every global
of the kernel with what it was at each call: 35 to 70 microseconds of host for the kernels of a
layer, several times the launch itself. What was compiled can be launched as it is
(`CompiledKernel[grid]`, as in Triton's tutorial on fused softmax), by whoever knows that nothing it
was specialised on has changed. That is what a `Launcher` knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ALIGNED_BYTES = 16  # Triton compiles for addresses that are a multiple of this, or for any
END_OF_INT32 = 2**31  # Triton passes integers from here on as 64 bits


@dataclass(frozen=True, eq=False, slots=True)
class Variant:
    """Compile-time arguments of a kernel by name, and its warps; told apart by identity.

    So whoever makes one keeps it, and gives the same one for the same sizes.
    """

    constants: Mapping[str, Any]
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class _Held:
    compiled: Any
    constants: tuple[Any, ...]


class Launcher:
    """Launches one kernel, whose parameters are tensors, then integers, then compile-time ones."""

    def __init__(self, kernel: Any) -> None:
        """`kernel` is of `triton.jit` with all its integers in `do_not_specialize`."""
        self._kernel = kernel
        self._held: dict[tuple[Any, ...], _Held] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        variant: Variant,
        tensors: Sequence[Tensor],
        integers: Sequence[int] = (),
    ) -> None:
        """Launch on the current stream of the current device. Host only, no sync. Source: ours.

        The first launch of a variant with tensors of these dtypes and alignments is Triton's own,
        which compiles. The kernel's globals are taken to stay as they are.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        key = (
            variant,
            tensors[0].device,
            *[tensor.dtype for tensor in tensors],
            *[address % ALIGNED_BYTES == 0 for address in addresses],
        )
        held = self._held.get(key)
        if held is not None and all(-END_OF_INT32 <= number < END_OF_INT32 for number in integers):
            held.compiled[grid](*tensors, *integers, *held.constants)
            return
        compiled = self._kernel[grid](
            *tensors, *integers, **variant.constants, num_warps=variant.num_warps
        )
        # Triton's interpreter compiles nothing.
        if compiled is not None and held is None:
            names = [parameter.name for parameter in self._kernel.params if parameter.is_constexpr]
            constants = tuple(variant.constants[name] for name in names)
            self._held[key] = _Held(compiled, constants)
