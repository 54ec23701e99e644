"""One item as the arrays that the model reads: ids, three positions, patches, answer places.

Host, numpy only: worker processes import this and never torch. The same as transformers' tokenizer,
chat template, image processor and `get_rope_index` give; the tests compare.

Shape letters: T tokens, P patches, M images, A answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PATCH = 16
MERGE = 2
PATCH_BYTES = PATCH * PATCH * 3
NUM_BYTES = 256
END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD = range(256, 262)


class ItemLike(Protocol):
    """What a task makes; `benchmarks.probe.item.Item` is one."""

    @property
    def parts(self) -> tuple[str | NDArray[np.uint8], ...]: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """An item ready to be packed."""

    ids_T: NDArray[np.int32]
    positions_3T: NDArray[np.int32]
    visual_T: NDArray[np.bool_]
    patches_P: NDArray[np.uint8]  # [P, 768]
    grids_M2: NDArray[np.int32]  # rows and columns of patches
    num_answer: int  # answer tokens with the closing one; they are the last


def _byte_ids() -> NDArray[np.int32]:
    """The id of each byte: GPT-2's printable letters for bytes, in the order of their codes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in set(shown)]
    letters = {byte: byte for byte in shown}
    letters.update({byte: NUM_BYTES + place for place, byte in enumerate(hidden)})
    ranks = {letter: rank for rank, letter in enumerate(sorted(letters.values()))}
    return np.array([ranks[letters[byte]] for byte in range(NUM_BYTES)], dtype=np.int32)


BYTE_IDS = _byte_ids()


def text_ids(text: str) -> NDArray[np.int32]:
    """One id a byte."""
    return BYTE_IDS[np.frombuffer(text.encode(), dtype=np.uint8)]


def _ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


_OPENING = np.concatenate([_ids(IM_START), text_ids("user\n")])
_CLOSING = np.concatenate([_ids(IM_END), text_ids("\n"), _ids(IM_START), text_ids("assistant\n")])


def cut_patches(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[P, 768] of an image [H, W, 3]: four patches of each 32 by 32 block after each other.

    Raises ValueError for sides that are not multiples of 32.
    """
    height, width = image.shape[:2]
    block = PATCH * MERGE
    if height % block or width % block:
        raise ValueError(f"image of {height}x{width}: both sides must be multiples of {block}")
    shape = (height // block, MERGE, PATCH, width // block, MERGE, PATCH, 3)
    return image.reshape(shape).transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, PATCH_BYTES)


def encode(item: ItemLike) -> Encoded:
    """Prompt and answer of `item` with everything that the model needs."""
    answer = np.concatenate([text_ids(item.answer), _ids(IM_END)])
    pieces: list[NDArray[np.int32]] = [_OPENING]
    patches, grids = [], []
    for part in item.parts:
        if isinstance(part, str):
            pieces.append(text_ids(part))
            continue
        patches.append(cut_patches(part))
        grids.append((part.shape[0] // PATCH, part.shape[1] // PATCH))
        pad = np.full(len(patches[-1]) // MERGE**2, IMAGE_PAD, dtype=np.int32)
        pieces += [_ids(VISION_START), pad, _ids(VISION_END)]
    ids_T = np.concatenate([*pieces, _CLOSING, answer])
    visual_T = ids_T == IMAGE_PAD
    return Encoded(
        ids_T=ids_T,
        positions_3T=_positions(visual_T, grids),
        visual_T=visual_T,
        patches_P=np.concatenate(patches) if patches else np.empty((0, PATCH_BYTES), np.uint8),
        grids_M2=np.array(grids, dtype=np.int32).reshape(-1, 2),
        num_answer=len(answer),
    )


def _positions(visual_T: NDArray[np.bool_], grids: list[tuple[int, int]]) -> NDArray[np.int32]:
    """[3, T]: text counts on; an image stays in time and spreads over rows and columns."""
    positions = np.empty((3, len(visual_T)), dtype=np.int32)
    done, current = 0, 0
    starts = np.flatnonzero(np.diff(visual_T.astype(np.int8), prepend=0) == 1)
    for start, (rows, columns) in zip(starts.tolist(), grids, strict=True):
        positions[:, done:start] = np.arange(current, current + start - done)
        current += start - done
        rows, columns = rows // MERGE, columns // MERGE
        done = start + rows * columns
        positions[0, start:done] = current
        positions[1, start:done] = current + np.repeat(np.arange(rows), columns)
        positions[2, start:done] = current + np.tile(np.arange(columns), rows)
        current += max(rows, columns)
    positions[:, done:] = np.arange(current, current + len(visual_T) - done)
    return positions
