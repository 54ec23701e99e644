"""A placement as a table for the terminal: layers with their load before and after, and memory.

Shape letters: none.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_moelb.placement import Expected, LoadFigures, Placement

MAX_LAYERS = 64
MIB = 1 << 20


def summary(placement: Placement) -> RenderableType:
    """One row a layer, the mean below, and what the figures rest on."""
    expected = placement.expected
    assert expected is not None
    table = Table(
        title=_title(placement),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("layer", "replicas", "low", "LIS", "after", "ranks", "after", "pass", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, layer in list(enumerate(placement.layers))[:MAX_LAYERS]:
        table.add_row(
            str(number),
            str(len(layer.replicas)),
            str(len(layer.low_experts)),
            *_cells(expected, itemgetter(number)),
        )
    table.add_row(
        "mean",
        f"{mean(len(layer.replicas) for layer in placement.layers):.1f}",
        f"{mean(len(layer.low_experts) for layer in placement.layers):.1f}",
        *_cells(expected, mean),
        style="bold",
    )
    return Group(table, *(Text(line) for line in notes(placement)))


def notes(placement: Placement) -> list[str]:
    """What the figures mean, and the memory, in sentences."""
    expected, origin = placement.expected, placement.origin
    assert expected is not None
    assert origin is not None
    lines = [
        "LIS: rows of the busiest copy of an expert over the mean expert's. ranks: rows, busiest "
        "rank / mean rank, of all passes together; pass: the same of single passes, their mean. "
        "Each expected with the rows of an expert split evenly over its copies; 1.00 is perfect.",
        f"calibrated on {origin.num_passes} of {origin.num_passes_read} prefill passes; figures of "
        + (
            "the same passes: there were no others."
            if expected.same_passes
            else f"the other {expected.num_passes}."
        ),
        f"LIS {mean(expected.before.lis) / mean(expected.after.lis):.2f} times lower in the mean. "
        f"Importance: {origin.importance}.",
        "memory of experts by rank, MiB: "
        + ", ".join(
            f"{before / MIB:.2f} -> {after / MIB:.2f}"
            for before, after in zip(placement.memory.before, placement.memory.after, strict=True)
        ),
    ]
    if len(placement.layers) > MAX_LAYERS:
        lines.append(f"{len(placement.layers) - MAX_LAYERS} further layers are in the file.")
    return lines


def _cells(expected: Expected, of: Callable[[list[float]], float]) -> list[str]:
    def pair(name: str) -> list[str]:
        both: tuple[LoadFigures, LoadFigures] = (expected.before, expected.after)
        return [f"{of(getattr(figures, name)):.2f}" for figures in both]

    return [*pair("lis"), *pair("rank_balance"), *pair("pass_balance")]


def _title(placement: Placement) -> str:
    sizes = placement.sizes
    num_replicas = sum(len(layer.replicas) for layer in placement.layers)
    num_low = sum(len(layer.low_experts) for layer in placement.layers)
    return (
        f"{num_replicas} replicas and {num_low} originals in {placement.format}, of "
        f"{sizes.num_layers} layers of {sizes.num_experts} experts, EP {sizes.num_ranks}"
    )
