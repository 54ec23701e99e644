"""Coloured shapes: their names, masks and places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from PIL import Image as Pil
from PIL import ImageDraw

from benchmarks.probe.item import CELL_PX, Image
from benchmarks.probe.tasks.base import Rng, between, pick, pick_distinct
from benchmarks.probe.tasks.canvas import Mask, Size, blank, paste

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = MappingProxyType(
    {
        "red": (215, 30, 35),
        "green": (30, 150, 50),
        "blue": (40, 75, 225),
        "yellow": (245, 220, 40),
        "purple": (150, 45, 190),
        "orange": (245, 130, 15),
    }
)
_ANGLES_DEG = (-16, -8, 0, 8, 16)
_SMOOTH = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of one colour; its centre and width in pixels."""

    shape: str
    colour: str
    y: int
    x: int
    size_px: int

    def __str__(self) -> str:
        return f"{self.shape},{self.colour},{self.y},{self.x},{self.size_px}"


def key_of(things: Sequence[Thing], size: Size) -> str:
    """The name of a picture of `things`, whatever their order."""
    return f"{size[0]}x{size[1]}:" + ";".join(sorted(map(str, things)))


def scatter(rng: Rng, kinds: Sequence[tuple[str, str]], size: Size) -> list[Thing]:
    """Place things of the given shapes and colours about the centres of different cells."""
    cells = rng.permutation(size[0] * size[1])[: len(kinds)]
    # Neighbours are at least 32 - 2 * 4 pixels apart: things of up to 22 do not touch.
    shifts = rng.integers(-4, 5, size=(len(kinds), 2))
    widths = rng.integers(16, 23, size=len(kinds))
    things = []
    for (shape, colour), cell, (dy, dx), width in zip(kinds, cells, shifts, widths, strict=True):
        row, column = divmod(int(cell), size[1])
        y = _within(row, int(dy), int(width), size[0])
        x = _within(column, int(dx), int(width), size[1])
        things.append(Thing(shape, colour, y, x, int(width)))
    return things


def _within(cell: int, shift_px: int, size_px: int, num_cells: int) -> int:
    """The middle of a cell, shifted, but no nearer to the edge than half a thing."""
    middle = cell * CELL_PX + CELL_PX // 2 + shift_px
    half = size_px // 2
    return min(max(middle, half), num_cells * CELL_PX - half)


def place_one(rng: Rng, size: Size) -> Thing:
    """One thing of any shape, colour and size, anywhere within the image."""
    height, width = size[0] * CELL_PX, size[1] * CELL_PX
    size_px = 4 * between(rng, 7, min(height, width) * 3 // 16)
    y = between(rng, size_px // 2, height - size_px // 2)
    x = between(rng, size_px // 2, width - size_px // 2)
    return Thing(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), y, x, size_px)


def pick_kinds(rng: Rng, num: int) -> list[tuple[str, str]]:
    """`num` shapes with colours, no shape and no colour twice."""
    colours = pick_distinct(rng, tuple(COLOURS), num)
    return list(zip(pick_distinct(rng, SHAPES, num), colours, strict=True))


def draw_things(rng: Rng, things: Sequence[Thing], size: Size) -> Image:
    """A picture of `things` on a background; hues and angles vary a little."""
    image, _ = blank(rng, size)
    for thing in things:
        mask = shape_mask(thing.shape, thing.size_px, pick(rng, _ANGLES_DEG))
        hue = np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, size=3)
        half = mask.shape[0] // 2
        colour = np.clip(hue, 0, 255).astype(np.int16)
        paste(image, mask, thing.y - half, thing.x - half, colour)
    return image


@lru_cache(maxsize=2048)
def shape_mask(shape: str, size_px: int, angle_deg: int) -> Mask:
    """The smoothed mask of a shape of `size_px` pixels, turned by `angle_deg`, square."""
    side = size_px * _SMOOTH
    canvas = Pil.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            edge = side * 0.22
            pen.ellipse((edge, edge, side - edge, side - edge), fill=0)
    else:
        corners = [(side * (1 + x) / 2, side * (1 + y) / 2) for x, y in _corners(shape, angle_deg)]
        pen.polygon(corners, fill=255)
    return np.array(canvas.resize((size_px, size_px), Pil.Resampling.BOX))


def _corners(shape: str, angle_deg: int) -> list[tuple[float, float]]:
    """Corners of a polygon within the unit circle, x to the right and y down."""
    if shape == "square":
        polar = [(1.0, a) for a in (45.0, 135.0, 225.0, 315.0)]
    elif shape == "triangle":
        polar = [(1.0, a) for a in (-90.0, 30.0, 150.0)]
    elif shape == "star":
        polar = [(1.0 if i % 2 == 0 else 0.42, -90.0 + 36 * i) for i in range(10)]
    else:
        thin, long = 0.3, 0.95
        half = [(thin, long), (thin, thin), (long, thin)]
        quarter = [(math.hypot(x, y), math.degrees(math.atan2(y, x))) for x, y in half]
        polar = [(r, a - 90 * turn) for turn in range(4) for r, a in quarter]
    turned = [(r, math.radians(a + angle_deg)) for r, a in polar]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in turned]
