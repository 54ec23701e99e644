"""A contact sheet with items of every task: `python -m benchmarks.probe.preview --out FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from matplotlib.figure import Figure

from benchmarks.probe.item import Image, Item, Part, num_prompt_tokens, num_vision_tokens
from benchmarks.probe.tasks import TASKS, make_item

_GAP_PX = 8
_NUM_COLUMNS = 4
_IMAGE_ROW_INCH = 2.9
_TEXT_ROW_INCH = 0.6


def main(
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.")] = Path("probe-tasks.png"),
    seed: Annotated[int, typer.Option(help="Which items.")] = 0,
    each: Annotated[int, typer.Option(min=1, help="Items of every task.")] = 4,
) -> None:
    """Draw a few items of every task with prompt, answer and length."""
    items = [make_item(task, "train", i, seed=seed) for task in TASKS for i in range(each)]
    figure = sheet(items)
    figure.savefig(out, dpi=80)
    plt.close(figure)
    typer.echo(out)


def sheet(items: list[Item]) -> Figure:
    """The items in rows of four: pictures side by side, text below."""
    num_rows = -(-len(items) // _NUM_COLUMNS)
    rows = [items[i * _NUM_COLUMNS : (i + 1) * _NUM_COLUMNS] for i in range(num_rows)]
    heights = [_IMAGE_ROW_INCH if any(map(_has_image, row)) else _TEXT_ROW_INCH for row in rows]
    figure, axes = plt.subplots(
        num_rows,
        _NUM_COLUMNS,
        figsize=(4.5 * _NUM_COLUMNS, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        picture = _join(item.parts)
        if picture is not None:
            axis.imshow(picture)
        num_all, num_vision = num_prompt_tokens(item.parts), num_vision_tokens(item.parts)
        asked = "".join(part if isinstance(part, str) else "▣" for part in item.parts)
        axis.set_title(
            f"{item.task} · {num_all} tokens, {num_vision / num_all:.0%} vision\n"
            f"{asked[:60]} → {item.answer}",
            fontsize=10,
        )
    return figure


def _has_image(item: Item) -> bool:
    return num_vision_tokens(item.parts) > 0


def _join(parts: tuple[Part, ...]) -> Image | None:
    images = [part for part in parts if not isinstance(part, str)]
    if not images:
        return None
    height = max(image.shape[0] for image in images)
    columns = []
    for image in images:
        below = height - image.shape[0]
        columns.append(np.pad(image, ((0, below), (0, _GAP_PX), (0, 0)), constant_values=255))
    return np.concatenate(columns, axis=1)


if __name__ == "__main__":
    typer.run(main)
