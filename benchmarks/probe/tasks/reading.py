"""Reading: handwritten digits, and words, letters and numbers in several fonts."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from benchmarks.probe.item import CELL_PX, Part, Split
from benchmarks.probe.tasks.base import NUM_PORTIONS, Rng, Scene, Task, between, pick
from benchmarks.probe.tasks.canvas import Mask, Size, blank, ink, paste, pick_size
from benchmarks.probe.tasks.glyphs import FONTS, write

_DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits.npz"
_DIGIT_PX = 32
_BASELINE_PX = 25
_CONSONANTS = "bcdfghjklmnprstvwxz"
_VOWELS = "aeiou"
_PATTERNS = ("cvc", "vcv", "cvcv", "vccv", "cvvc", "cvcvc", "vcvcv", "cvccv")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _word(rng: Rng) -> str:
    pattern = pick(rng, _PATTERNS)
    return "".join(pick(rng, _CONSONANTS if kind == "c" else _VOWELS) for kind in pattern)


def _letters(rng: Rng) -> str:
    return "".join(pick(rng, _LETTERS) for _ in range(between(rng, 2, 4)))


def _number(rng: Rng) -> str:
    num_digits = between(rng, 2, 5)
    return str(between(rng, 10 ** (num_digits - 1), 10**num_digits - 1))


_MATERIAL = {"word": _word, "letters": _letters, "number": _number}


def _sample_text(kind: str, rng: Rng, split: Split) -> Scene:
    text = _MATERIAL[kind](rng)
    question = f"{kind}?"
    size = pick_size(rng, question, lowest=(4, len(text) + 1))
    return Scene(text, text, partial(_render_text, text, question, size))


def _render_text(text: str, question: str, size: Size, rng: Rng) -> tuple[Part, ...]:
    image, is_dark = blank(rng, size)
    row, column = between(rng, 0, size[0] - 1), between(rng, 0, size[1] - len(text))
    centre_x = (column * 2 + 1) * CELL_PX // 2 + between(rng, -4, 4)
    baseline_y = row * CELL_PX + _BASELINE_PX + between(rng, -4, 4)
    write(
        image,
        text,
        font=pick(rng, FONTS),
        size_px=between(rng, 24, 31),
        colour=ink(rng, is_dark=is_dark),
        # Neither a wide letter nor one that goes below the line is cut off by the edge.
        centre_x=min(max(centre_x, 19), (size[1] - len(text) + 1) * CELL_PX - 19),
        baseline_y=min(baseline_y, size[0] * CELL_PX - 10),
        pitch_px=CELL_PX,
        rng=rng,
    )
    return image, question


def _sample_digits(rng: Rng, split: Split) -> Scene:
    _, labels = _handwriting()
    pool = digit_ids(split)
    ids = [int(i) for i in pool[rng.integers(len(pool), size=between(rng, 1, 3))]]
    answer = "".join(str(labels[i]) for i in ids)
    return Scene(",".join(map(str, ids)), answer, partial(_render_digits, ids))


def _render_digits(ids: list[int], rng: Rng) -> tuple[Part, ...]:
    question = "digits?"
    size = pick_size(rng, question, lowest=(4, len(ids) + 1))
    image, is_dark = blank(rng, size)
    colour = ink(rng, is_dark=is_dark)
    row, column = between(rng, 0, size[0] - 1), between(rng, 0, size[1] - len(ids))
    for i, digit in enumerate(ids):
        dy, dx = (int(v) for v in rng.integers(-3, 4, size=2))
        top = min(max(row * CELL_PX + dy, 0), image.shape[0] - _DIGIT_PX)
        left = (column + i) * CELL_PX + dx
        paste(image, _deformed(rng, digit), top, left, colour)
    return image, question


def _deformed(rng: Rng, digit: int) -> Mask:
    """A handwritten digit, slightly turned, sheared and resized, [32, 32]."""
    turn, shear, scale = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.2)
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    a, b, d, e = cos, sin + shear, -sin, cos
    c = (_DIGIT_PX - 1) / 2
    matrix = (a, b, c - a * c - b * c, d, e, c - d * c - e * c)
    drawn = _enlarged(digit)
    turned = drawn.transform(drawn.size, Pil.Transform.AFFINE, matrix, Pil.Resampling.BILINEAR)
    return np.array(turned)


@cache
def _enlarged(digit: int) -> Pil.Image:
    images, _ = _handwriting()
    greys = np.minimum(images[digit].astype(np.int32) * 16, 255).astype(np.uint8)
    # The digit's 8 by 8 pixels fill 26 of 32, so that turning it cuts nothing off.
    canvas = Pil.new("L", (_DIGIT_PX, _DIGIT_PX))
    canvas.paste(Pil.fromarray(greys).resize((26, 28), Pil.Resampling.BICUBIC), (3, 2))
    return canvas


@cache
def digit_ids(split: Split) -> NDArray[np.intp]:
    """Which of the handwritten digits belong to `split`: every eighth is for tests."""
    is_test = np.arange(len(_handwriting()[1])) % NUM_PORTIONS == 0
    return np.flatnonzero(is_test == (split == "test"))


@cache
def _handwriting() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(_DIGITS_FILE) as file:
        return file["images"], file["labels"]


TASKS = (
    Task(name="digits", modality="vision", sample=_sample_digits, has_pools=True),
    *(Task(name=kind, modality="vision", sample=partial(_sample_text, kind)) for kind in _MATERIAL),
)
