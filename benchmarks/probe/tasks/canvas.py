"""Backgrounds, and pasting of masks onto them. Everything here is on the host, uint8 RGB."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from benchmarks.probe.item import CELL_PX, NUM_IMAGE_MARKS, NUM_TEMPLATE_TOKENS, Image
from benchmarks.probe.tasks.base import Rng, between, pick

Mask = NDArray[np.uint8]  # [height, width], 255 where covered
Size = tuple[int, int]  # height and width in cells of 32 pixels

_BANK_PX = 640
_MAX_OFFSET_PX = 128
_SIZES = tuple(product(range(4, 15), range(4, 15)))
_MAX_ASPECT = 2.5
_SPARE_TOKENS = 16
_LARGE_SHARE = 0.12  # of images that make up more of the prompt
_LARGE_SPARE_TOKENS = 150


def pick_size(rng: Rng, question: str, *, lowest: Size = (4, 4)) -> Size:
    """A size at which the image is at least half of the prompt that asks `question` about it."""
    least = NUM_TEMPLATE_TOKENS + NUM_IMAGE_MARKS + len(question.encode())
    spare = _LARGE_SPARE_TOKENS if rng.random() < _LARGE_SHARE else _SPARE_TOKENS
    return pick(rng, _fitting(least, least + spare, lowest))


@cache
def _fitting(least: int, most: int, lowest: Size) -> tuple[Size, ...]:
    """Sizes of `least` to `most` cells, not smaller than `lowest`, and not too long."""
    fitting = (
        (h, w)
        for h, w in _SIZES
        if h >= lowest[0]
        and w >= lowest[1]
        and least <= h * w <= most
        and max(h, w) <= _MAX_ASPECT * min(h, w)
    )
    return tuple(fitting)


def blank(rng: Rng, size: Size) -> tuple[Image, bool]:
    """An image with a background, and whether that is dark.

    Backgrounds are greys with a slight tint: flat, shaded, noisy, cloudy or striped.
    """
    height, width = size[0] * CELL_PX, size[1] * CELL_PX
    is_dark = bool(rng.integers(2))
    level = between(rng, 10, 75) if is_dark else between(rng, 180, 245)
    base = np.tile((level + rng.integers(-10, 11, size=3)).astype(np.int16), width)
    kind = int(rng.integers(8))
    if kind < 3:
        shade = np.zeros((height, 1), np.int16)
    elif kind == 3:
        shade = _slope(rng, height, width)
    else:
        y, x = (int(v) for v in rng.integers(0, _MAX_OFFSET_PX, size=2))
        texture = _textures()[kind % 4][y : y + height, 3 * x : 3 * (x + width)]
        shade = (texture * np.int16(between(rng, 4, 20))) >> 6
    image = np.clip(base + shade, 0, 255).astype(np.uint8)
    return image.reshape(height, width, 3), is_dark


def ink(rng: Rng, *, is_dark: bool) -> NDArray[np.int16]:
    """A colour for writing that stands out from a background."""
    low, high = (175, 256) if is_dark else (0, 81)
    return rng.integers(low, high, size=3).astype(np.int16)


def paste(image: Image, mask: Mask, top: int, left: int, colour: NDArray[np.int16]) -> None:
    """Colour `image` where `mask` covers it; what lies outside the image is cut off."""
    y, x = max(0, top), max(0, left)
    bottom = min(image.shape[0], top + mask.shape[0])
    right = min(image.shape[1], left + mask.shape[1])
    if bottom <= y or right <= x:
        return
    # Rows of 3 * width values: numpy is slow along an axis of length 3.
    rows = image.reshape(image.shape[0], -1)[y:bottom, 3 * x : 3 * right]
    visible = mask[y - top : bottom - top, x - left : right - left]
    cover = np.repeat(visible, 3, axis=1).astype(np.int32)
    below = rows.astype(np.int32)
    rows[:] = below + (np.tile(colour, right - x) - below) * cover // 255


def _slope(rng: Rng, height: int, width: int) -> NDArray[np.int16]:
    dy, dx = (float(v) for v in rng.uniform(-20, 20, size=2))
    rows = np.linspace(-dy, dy, height, dtype=np.float32)
    columns = np.linspace(-dx, dx, width, dtype=np.float32)
    return (rows[:, None] + np.repeat(columns, 3)).astype(np.int16)


@cache
def _textures() -> tuple[NDArray[np.int16], ...]:
    """White noise, clouds, stripes and checks, about -64 to 64, [640, 3 * 640]: grey, as RGB."""
    rng = np.random.default_rng(20261122)
    white = rng.integers(-64, 65, size=(_BANK_PX, _BANK_PX))
    coarse = rng.uniform(-64, 64, size=(_BANK_PX // 20 + 2,) * 2)
    steps = np.arange(_BANK_PX) / 20
    low = steps.astype(int)
    part = steps - low
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    clouds = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    y, x = np.mgrid[:_BANK_PX, :_BANK_PX]
    stripes = 60 * np.sin((y + 2 * x) / 9)
    checks = 50 * np.sign(np.sin(y / 7.5) * np.sin(x / 7.5))
    greys = (white, clouds, stripes, checks)
    return tuple(np.repeat(texture.astype(np.int16), 3, axis=1) for texture in greys)
