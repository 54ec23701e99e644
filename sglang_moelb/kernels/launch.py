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
from functools import cache
from typing import Any

from torch import Tensor

ALIGNED_BYTES = 16  # Triton compiles for addresses that are a multiple of this, or for any
END_OF_INT32 = 2**31  # Triton passes integers from here on as 64 bits


@dataclass(frozen=True, eq=False, slots=True)
class Variant:
    """Compile-time arguments of a kernel by name, and its warps; see `variant_of`."""

    constants: Mapping[str, Any]
    num_warps: int = 4


@cache
def variant_of(num_warps: int, **constants: int | tuple[int, ...]) -> Variant:
    """The one variant of these: variants are told apart by identity. Host only."""
    return Variant(constants, num_warps)


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
        tensors: Sequence[Tensor | tuple[Tensor, ...]],
        integers: Sequence[int] = (),
    ) -> None:
        """Launch on the current stream of the current device. Host only, no sync. Source: ours.

        A tuple of tensors is one parameter of the kernel. The first launch of a variant with
        tensors of these dtypes and alignments is Triton's own, which compiles. The kernel's globals
        are taken to stay as they are.
        """
        flat: list[Tensor] = []
        for one in tensors:
            if type(one) is tuple:
                flat += one
            else:
                flat.append(one)  # type: ignore[arg-type]
        dtypes, places = [], 0
        for tensor in flat:
            dtypes.append(tensor.dtype)
            places |= tensor.data_ptr()
        key = (variant, flat[0].device, *dtypes)
        if places % ALIGNED_BYTES:
            key += tuple([tensor.data_ptr() % ALIGNED_BYTES == 0 for tensor in flat])
        held = self._held.get(key)
        fit = not integers or (min(integers) >= -END_OF_INT32 and max(integers) < END_OF_INT32)
        if held is not None and fit:
            held.compiled[grid](*tensors, *integers, *held.constants)
            return
        compiled = self._kernel[grid](
            *tensors, *integers, **variant.constants, num_warps=variant.num_warps
        )
        # Triton's interpreter compiles nothing.
        if compiled is not None and held is None:
            names = _constants_of(self._kernel.params, len(tensors), len(integers))
            constants = tuple([variant.constants[name] for name in names])
            self._held[key] = _Held(compiled, constants)


def _constants_of(parameters: Sequence[Any], num_tensors: int, num_integers: int) -> list[str]:
    """The names behind tensors and integers, none of which Triton may have specialised on."""
    first = num_tensors + num_integers
    assert all(p.do_not_specialize for p in parameters[num_tensors:first]), parameters
    assert all(p.is_constexpr == (at >= first) for at, p in enumerate(parameters)), parameters
    return [p.name for p in parameters[first:]]
