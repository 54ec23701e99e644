"""Pictures of a training: loss and accuracy curves, and which experts each modality uses.

    python -m benchmarks.probe.figures --out FOLDER

reads curve.jsonl and, where there is one, skew.json in the folder and writes training.png and
experts.png there. Host.

Shape letters: L layers, E experts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sglang_moelb.ab.theme import LIGHT, SERIES, Theme, render

NUM_RANKS = 8
TEXT_TASKS = frozenset({"copy", "sort", "sum", "lookup"})
NUM_NAMED = 5
MOST_OVER_EVEN = 4.0


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Rows of a curve; raises ValueError when there is none or a row is no JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; it is written by benchmarks.probe.train")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); remove the line") from error
    return rows


def draw_training(rows: list[dict[str, Any]], theme: Theme, figure: Figure) -> None:
    """Loss above, accuracy on held-out items below, over minutes."""
    steps = [row for row in rows if row["kind"] == "train"]
    tests = [row for row in rows if row["kind"] in ("test", "final")]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.6))
    above.plot(_minutes(steps), [r["loss"] for r in steps], color=SERIES[0], lw=1, label="training")
    above.plot(
        _minutes(tests), [r["loss"] for r in tests], "o-", color=SERIES[1], ms=3, label="held out"
    )
    above.set_yscale("log")
    above.yaxis.set_major_formatter("{x:g}")
    above.set_ylabel("loss of answer tokens")
    above.set_title("Loss")
    above.legend()
    _draw_tasks(below, tests, theme)


def _draw_tasks(axes: Axes, tests: list[dict[str, Any]], theme: Theme) -> None:
    minutes = _minutes(tests)
    last = tests[-1]["accuracy"] if tests else {}
    worst = sorted(last, key=lambda task: last[task])[:NUM_NAMED]
    for task in last:
        values = [row["accuracy"].get(task, np.nan) for row in tests]
        colour = SERIES[2] if task in TEXT_TASKS else SERIES[0]
        axes.plot(minutes, values, color=colour, lw=0.8, alpha=0.55)
    means = [row["mean_accuracy"] for row in tests]
    axes.plot(minutes, means, color=theme.text, lw=2.2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("whole answers right")
    names = ", ".join(f"{task} {last[task]:.2f}" for task in worst)
    axes.set_title(f"Accuracy by task on held-out items\nlowest: {names}", fontsize=9.5)
    axes.plot([], [], color=theme.text, lw=2.2, label=f"mean {means[-1]:.3f}" if means else "mean")
    axes.plot([], [], color=SERIES[0], lw=0.8, label="vision tasks")
    axes.plot([], [], color=SERIES[2], lw=0.8, label="text tasks")
    axes.legend(loc="lower right")


def _minutes(rows: list[dict[str, Any]]) -> list[float]:
    return [row["seconds"] / 60 for row in rows]


def draw_experts(skew: dict[str, Any], theme: Theme, figure: Figure) -> None:
    """Share of each expert over an even one, by layer and modality, trained above untrained."""
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=MOST_OVER_EVEN)
    both = figure.subplots(2, 1)
    for axes, name in zip(both, ("trained", "untrained"), strict=True):
        shares = np.array(skew[name]["expert_share_L2E"])
        image = axes.imshow(_rows(shares), aspect="auto", cmap="RdBu_r", norm=norm)
        num_layers, _, num_experts = shares.shape
        labels = [f"{kind} {n}" for kind in ("text", "vision") for n in range(num_layers)]
        axes.set_yticks(range(2 * num_layers), labels)
        axes.axhline(num_layers - 0.5, color=theme.text, lw=1.2)
        for rank in range(1, NUM_RANKS):
            axes.axvline(rank * num_experts / NUM_RANKS - 0.5, color=theme.text, lw=0.5)
        axes.grid(visible=False)
        axes.set_title(f"{name.capitalize()}: load of experts, 1 is an even share")
    both[1].set_xlabel(f"expert (lines: the {NUM_RANKS} ranks of EP {NUM_RANKS})")
    figure.colorbar(image, ax=both, label="load over even share", extend="max", shrink=0.8)


def _rows(shares_L2E: NDArray[np.float64]) -> NDArray[np.float64]:
    num_experts = shares_L2E.shape[2]
    rows: NDArray[np.float64] = shares_L2E.transpose(1, 0, 2) * num_experts
    return rows.reshape(-1, num_experts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of a training.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that train wrote")
    folder: Path = parser.parse_args().out
    try:
        rows = read_curve(folder / "curve.jsonl")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    picture = render(LIGHT, 6.4, lambda figure: draw_training(rows, LIGHT, figure))
    (folder / "training.png").write_bytes(picture)
    if (folder / "skew.json").is_file():
        skew = json.loads((folder / "skew.json").read_text())
        picture = render(LIGHT, 5.2, lambda figure: draw_experts(skew, LIGHT, figure))
        (folder / "experts.png").write_bytes(picture)


if __name__ == "__main__":
    main()
