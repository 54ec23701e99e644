"""Write a comparison to a folder: `result.json`, the plots, `report.html`, and the raw records."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup
from matplotlib.figure import Figure

from sglang_moelb.ab import plots, plots_serving, wording
from sglang_moelb.ab.result import Result
from sglang_moelb.ab.theme import DARK, LIGHT, render
from sglang_moelb.ab.types import ArmRun

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A plot in both colours of page; `name` is the file's, without ending."""

    name: str
    caption: str
    light: bytes
    dark: bytes


def write_report(out: Path, runs: Sequence[ArmRun], result: Result) -> Path:
    """Write everything to `out` and return the path of the HTML file, which needs no other."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    _write_raw(out, runs)
    made = {plot.name: plot for plot in _plots(runs, result)}
    for plot in made.values():
        (out / f"{plot.name}.png").write_bytes(plot.light)
    page = out / "report.html"
    page.write_text(_render(result, made), encoding="utf-8")
    return page


def _write_raw(out: Path, runs: Sequence[ArmRun]) -> None:
    for run in runs:
        folder = out / run.arm.name
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / "requests.jsonl", run.outcomes)
        if run.passes:
            _write_lines(folder / "passes.jsonl", run.passes)


def _write_lines(path: Path, rows: Sequence[object]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _plots(runs: Sequence[ArmRun], result: Result) -> Iterator[Plot]:
    yield _plot(
        "throughput",
        "Output throughput, one point a round.",
        0.9 + 0.4 * len(runs),
        partial(plots_serving.throughput_of_rounds, runs=runs),
    )
    yield _plot(
        "latency",
        "Share of requests done within a time, all rounds together.",
        5.2,
        partial(plots_serving.latency_distributions, runs=runs),
    )
    if any(arm.agreement for arm in result.arms[1:]):
        yield _plot(
            "logprob-distance",
            "How far the log-probabilities of equal tokens are from the first arm's.",
            3.2,
            partial(plots_serving.distances, base=runs[0], others=runs[1:]),
        )
    names = wording.counted_names(result)
    if names:
        yield _plot(
            "accuracy",
            "Share of right answers with its 95 % interval, in all and by group.",
            1.3 + 0.09 * len(names) * (1 + len(runs)),
            partial(plots_serving.accuracy_by_name, result=result, names=names),
        )
    for run, arm in zip(runs, result.arms, strict=True):
        if arm.passes is not None and arm.passes.num_seen:
            yield from _pass_plots(run, arm.passes.quality_budget, result)


def _pass_plots(run: ArmRun, budget: float | None, result: Result) -> Iterator[Plot]:
    name = run.arm.name
    passes = next(arm.passes for arm in result.arms if arm.name == name)
    if passes is not None and passes.layers:
        yield _plot(
            f"{name}-balance",
            "Rows of the busiest rank over the mean rank, per MoE layer, prefill passes. The "
            "whisker ends at the 95th percentile.",
            3.5,
            partial(plots.balance_per_layer, layers=passes.layers),
        )
        yield _plot(
            f"{name}-load",
            "Rows of each rank, all layers of a prefill pass together. A point is a pass, a line "
            "the running mean of nine.",
            4.8,
            partial(plots.load_per_rank, records=run.passes),
        )
    yield _plot(
        f"{name}-levers",
        "What the policy of each pass said, and what acted after the gates for small batches and "
        "for decode.",
        2.5,
        partial(plots.levers_over_time, records=run.passes),
    )
    yield _plot(
        f"{name}-weight",
        "Share of routed weight dropped or moved in each pass.",
        3.2,
        partial(plots.weight_lost_and_moved, records=run.passes, budget=budget),
    )


def _plot(name: str, caption: str, height_in: float, draw: Callable[[Figure], None]) -> Plot:
    return Plot(
        name=name,
        caption=caption,
        light=render(LIGHT, height_in, draw),
        dark=render(DARK, height_in, draw),
    )


def _render(result: Result, made: dict[str, Plot]) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(
        files("sglang_moelb.ab").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        result=result,
        conditions=result.conditions,
        words=wording,
        command=shlex.join,
        picture=lambda name: _picture(made[name]) if name in made else "",
        has=made.__contains__,
    )


def _picture(plot: Plot) -> Markup:
    template = Markup(
        '<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        '<img src="{light}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>'
    )
    return template.format(dark=_uri(plot.dark), light=_uri(plot.light), caption=plot.caption)


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
