"""Encoded items side by side in one batch of arrays, and that batch on the device.

`pack` runs on the host in worker processes; `upload` copies one block of bytes to the device and
cuts it there into views, so a batch is one transfer.

Shape letters: T tokens, S prompts, P patches, M images, V visual tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.probe.encode import PATCH_BYTES, Encoded

ALIGNMENT = 64
Arrays = dict[str, NDArray[np.generic]]
Layout = dict[str, tuple[int, str, tuple[int, ...]]]  # offset, dtype, shape of each array


@dataclass(frozen=True, slots=True)
class Header:
    """What the host needs to know of a batch, beside the arrays in its block of bytes."""

    layout: Layout
    num_bytes: int
    num_items: int
    num_tokens: int


def pack(items: Sequence[Encoded], tasks: Sequence[int]) -> Arrays:
    """All items in one row of tokens; `tasks` are the numbers of their tasks."""
    lengths = np.array([len(item.ids_T) for item in items], dtype=np.int32)
    ends_S = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    visual_T = np.concatenate([item.visual_T for item in items])
    counts = np.array([item.num_answer for item in items])
    owner_A = np.repeat(np.arange(len(items)), counts)
    within_A = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    # A token predicts its successor, so the places are one before the answer's.
    answer_A = (ends_S[1:] - counts)[owner_A] + within_A - 1
    ids_T = np.concatenate([item.ids_T for item in items])
    grids_M2 = np.concatenate([item.grids_M2 for item in items])
    image_ends = np.concatenate([[0], np.cumsum(grids_M2.prod(1))]).astype(np.int32)
    return {
        "ids_T": ids_T,
        "positions_3T": np.concatenate([item.positions_3T for item in items], axis=1),
        "ends_S": ends_S,
        "visual_V": np.flatnonzero(visual_T).astype(np.int64),
        "answer_A": answer_A.astype(np.int64),
        "answer_ids_A": ids_T[answer_A + 1].astype(np.int64),
        "owner_A": owner_A.astype(np.int64),
        "task_S": np.array(tasks, dtype=np.int64),
        "grids_M2": grids_M2,
        "image_ends_M": image_ends,
        "patches_P": np.concatenate([item.patches_P for item in items]),
    }


def measure(arrays: Mapping[str, NDArray[np.generic]]) -> Header:
    """Where each array goes in a block of bytes, each at a multiple of 64."""
    layout: Layout = {}
    offset = 0
    for name, array in arrays.items():
        layout[name] = (offset, array.dtype.str, array.shape)
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return Header(layout, offset, len(arrays["task_S"]), len(arrays["ids_T"]))


def write(arrays: Mapping[str, NDArray[np.generic]], block: NDArray[np.uint8]) -> Header:
    """Copy the arrays into `block`; raises ValueError when they do not fit."""
    header = measure(arrays)
    if header.num_bytes > block.size:
        raise ValueError(f"a batch of {header.num_bytes} bytes exceeds its slot of {block.size}")
    for name, view in read(header, block).items():
        view[...] = arrays[name]
    return header


def read(header: Header, block: NDArray[np.uint8]) -> Arrays:
    """Views of the arrays in `block`."""
    views: Arrays = {}
    for name, (offset, dtype, shape) in header.layout.items():
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        views[name] = block[offset : offset + num_bytes].view(dtype).reshape(shape)
    return views


def slot_bytes(max_tokens: int, max_item_tokens: int) -> int:
    """An upper bound of a batch: every token four patches and its ids, positions and places."""
    return (max_tokens + max_item_tokens) * (4 * PATCH_BYTES + 128) + 64 * ALIGNMENT
