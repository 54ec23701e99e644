"""Writing with the fonts that matplotlib ships: masks of single letters, drawn once each."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL import ImageDraw, ImageFont

from benchmarks.probe.item import Image
from benchmarks.probe.tasks.base import Rng
from benchmarks.probe.tasks.canvas import Mask, paste

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)


def write(
    image: Image,
    text: str,
    *,
    font: str,
    size_px: int,
    colour: NDArray[np.int16],
    centre_x: int,
    baseline_y: int,
    pitch_px: int,
    rng: Rng | None = None,
) -> None:
    """Write `text`, a letter every `pitch_px` pixels, its first one centred at `centre_x`.

    With `rng`, each letter is off its place by up to two pixels.
    """
    shifts = rng.integers(-2, 3, size=(len(text), 2)) if rng else np.zeros((len(text), 2), int)
    for i, (char, (dy, dx)) in enumerate(zip(text, shifts, strict=True)):
        mask, top = glyph(font, size_px, char)
        left = centre_x + i * pitch_px - mask.shape[1] // 2
        paste(image, mask, baseline_y + top + int(dy), left + int(dx), colour)


@cache
def glyph(font: str, size_px: int, char: str) -> tuple[Mask, int]:
    """The mask of `char` without margins, and its upper edge against the baseline in pixels."""
    face = _face(font, size_px)
    left, top, right, bottom = (round(v) for v in face.getbbox(char, anchor="ls"))
    canvas = Pil.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), char, font=face, fill=255, anchor="ls")
    return np.array(canvas), top


@cache
def _face(font: str, size_px: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    return ImageFont.truetype(str(path), size_px)
