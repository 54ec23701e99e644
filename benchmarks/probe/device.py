"""A packed batch on the device, as the model takes it.

Shape letters: T tokens, S prompts, A answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.probe.attend import Backend, Segments, group_segments
from benchmarks.probe.model import Prompts
from benchmarks.probe.pack import Header, read
from benchmarks.probe.vision import Images

LENGTH_STEP = 256  # the longest segment, rounded up, takes few values: fewer compilations


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts with their answers, on the device."""

    prompts: Prompts
    answer_ids_A: Tensor
    owner_A: Tensor  # the prompt of each answer token
    task_S: Tensor
    num_items: int
    num_tokens: int


def upload(
    header: Header, block: NDArray[np.uint8], device: torch.device, backend: Backend,
    pinned: Tensor | None = None,
) -> Batch:  # fmt: skip
    """One transfer of the used part of `block`, through `pinned` memory when given."""
    host = torch.from_numpy(block[: header.num_bytes])
    if pinned is not None:
        host = pinned[: header.num_bytes].copy_(host)
    # Without pinned memory the copy is made here too: the slot is written again soon.
    whole = host.to(device, non_blocking=True, copy=True)
    views = {
        name: _view(whole, offset, dtype, shape)
        for name, (offset, dtype, shape) in header.layout.items()
    }
    on_host = read(header, block)
    images = None
    if len(on_host["grids_M2"]):
        segments = _segments(views["image_ends_M"], on_host["image_ends_M"], backend)
        images = Images(views["patches_P"], views["grids_M2"], segments)
    prompts = Prompts(
        ids_T=views["ids_T"],
        positions_3T=views["positions_3T"],
        segments=_segments(views["ends_S"], on_host["ends_S"], backend),
        images=images,
        visual_V=views["visual_V"],
        answer_A=views["answer_A"],
    )
    return Batch(
        prompts=prompts,
        answer_ids_A=views["answer_ids_A"],
        owner_A=views["owner_A"],
        task_S=views["task_S"],
        num_items=header.num_items,
        num_tokens=header.num_tokens,
    )


def _view(whole: Tensor, offset: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return whole[offset : offset + num_bytes].view(kind).view(shape)


def _segments(ends: Tensor, on_host: NDArray[np.generic], backend: Backend) -> Segments:
    lengths: NDArray[np.int64] = np.diff(on_host.astype(np.int64))  # type: ignore[assignment]
    groups = group_segments(lengths, ends.device) if backend == "padded" else ()
    longest = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    return Segments(ends, longest, groups)
