"""Colours and matplotlib settings of the plots, for light and for dark pages.

Series colours are Okabe and Ito's, which people with colour-blindness can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 160
WIDTH_IN = 6.4
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#B8A800")
LEVERS = {
    "none": "#8A8F98",
    "expand": "#0072B2",
    "drop": "#E69F00",
    "downgrade": "#CC79A7",
    "replicate": "#009E73",
}


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of everything that is not a series."""

    name: str
    background: str
    text: str
    grid: str


LIGHT = Theme("light", "#ffffff", "#1f2328", "#d8dce2")
DARK = Theme("dark", "#15181d", "#e4e7eb", "#3a404a")


def lever_colour(lever: str) -> str:
    """The colour of a lever; one that this version does not know gets its own."""
    return LEVERS.get(lever, "#D55E00")


def render(theme: Theme, height_in: float, draw: Callable[[Figure], None]) -> bytes:
    """A PNG of the figure that `draw` fills, in the colours of `theme`."""
    settings: dict[Any, Any] = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 10.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "font.size": 10.5,
        "grid.linewidth": 0.6,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
