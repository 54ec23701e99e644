"""Bar charts: which bar is the tallest, and the value written above it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.probe.item import CELL_PX, Image, Part, Split
from benchmarks.probe.tasks.base import Rng, Scene, Task, between, pick, pick_distinct
from benchmarks.probe.tasks.canvas import Size, blank, ink, pick_size
from benchmarks.probe.tasks.glyphs import FONTS, write

_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MIN_LEAD = 6
_TOP_MARGIN_PX = 28
_QUESTIONS = {"chart_label": "tallest bar?", "chart_value": "tallest value?"}


@dataclass(frozen=True, slots=True)
class _Chart:
    labels: tuple[str, ...]
    values: tuple[int, ...]  # 10 to 99
    size: Size
    first_column: int


def _sample(kind: str, rng: Rng, split: Split) -> Scene:
    num_bars = between(rng, 3, 5)
    tallest = between(rng, 40, 99)
    values = [tallest, *(between(rng, 10, tallest - _MIN_LEAD) for _ in range(num_bars - 1))]
    values = [values[int(i)] for i in rng.permutation(num_bars)]
    labels = pick_distinct(rng, _LABELS, num_bars)
    size = pick_size(rng, _QUESTIONS[kind], lowest=(5, num_bars))
    chart = _Chart(tuple(labels), tuple(values), size, between(rng, 0, size[1] - num_bars))
    answer = labels[values.index(tallest)] if kind == "chart_label" else str(tallest)
    key = f"{labels} {values}"
    return Scene(key, answer, partial(_render, chart, kind))


def _render(chart: _Chart, kind: str, rng: Rng) -> tuple[Part, ...]:
    image, is_dark = blank(rng, chart.size)
    has_values = kind == "chart_value" or bool(rng.integers(2))
    colour, font = ink(rng, is_dark=is_dark), pick(rng, FONTS)
    base_y = (chart.size[0] - 1) * CELL_PX
    image[base_y : base_y + 2] = colour
    hue = _bar_colour(rng)
    is_motley = bool(rng.integers(2))
    for i, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        centre_x = (chart.first_column + i) * CELL_PX + CELL_PX // 2 + between(rng, -2, 2)
        top = base_y - value * (base_y - _TOP_MARGIN_PX) // 100
        half = between(rng, 7, 13)
        image[top:base_y, centre_x - half : centre_x + half] = (
            _bar_colour(rng) if is_motley else hue
        )
        _write_label(image, label, font, colour, centre_x, base_y + 26)
        if has_values:
            _write_value(image, str(value), font, colour, centre_x, top - 4)
    return image, _QUESTIONS[kind]


def _write_label(
    image: Image, label: str, font: str, colour: np.ndarray, centre_x: int, baseline_y: int
) -> None:
    write(
        image,
        label,
        font=font,
        size_px=24,
        colour=colour,
        centre_x=centre_x,
        baseline_y=baseline_y,
        pitch_px=0,
    )


def _write_value(
    image: Image, value: str, font: str, colour: np.ndarray, centre_x: int, baseline_y: int
) -> None:
    pitch_px = 14
    write(
        image,
        value,
        font=font,
        size_px=22,
        colour=colour,
        centre_x=centre_x - pitch_px // 2,
        baseline_y=baseline_y,
        pitch_px=pitch_px,
    )


def _bar_colour(rng: Rng) -> np.ndarray:
    """A strong colour: one channel high, one low."""
    colour = rng.integers(40, 220, size=3)
    high, low = pick_distinct(rng, (0, 1, 2), 2)
    colour[high], colour[low] = 225, 35
    return colour.astype(np.int16)


TASKS = tuple(
    Task(name=kind, modality="vision", sample=partial(_sample, kind)) for kind in _QUESTIONS
)
