"""Accuracy of a running server on the probe: `python -m benchmarks.probe.evaluate --url URL`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.probe.ask import ServerStoppedError, ask, check_server
from benchmarks.probe.compare import check_reference, compare
from benchmarks.probe.result import (
    Compared,
    Evaluation,
    Graded,
    accuracies,
    average,
    read_result,
    write_result,
)
from benchmarks.probe.suite import ProbeError, Suite, parse_tasks
from benchmarks.probe.table import closing_line, tables


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A server to ask, and how."""

    url: str
    model: str
    concurrency: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What a server gave. `failure` is "" or why it ended early."""

    items: tuple[Graded, ...]
    wall_s: float
    failure: str


def main(
    url: Annotated[str, typer.Option(help="Address of the server.")],
    items: Annotated[int, typer.Option(min=1, help="How many, the tasks taking turns.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Which test items.")] = 0,
    tasks: Annotated[str, typer.Option(help="Names separated by commas.", show_default="all")] = "",
    out: Annotated[Path, typer.Option(help="The result, JSON.")] = Path("probe-eval.json"),
    reference_url: Annotated[
        str | None, typer.Option(help="A second server, asked the same, to compare with.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A result of --out to compare with.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    request_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one request, at most.")
    ] = 120.0,
) -> None:
    """Ask a running server test items of the probe and count the right answers.

    The result is written also if the server stops in the middle, marked partial. Exit code 1 if
    it is partial, 2 if nothing could be asked.
    """
    console = Console()
    try:
        if out.is_dir():
            raise ProbeError(f"--out {out}: is a folder. Give a file, e.g. {out / 'eval.json'}")
        suite = Suite(num_items=items, seed=seed, tasks=parse_tasks(tasks))
        saved = _saved(reference, reference_url, suite)
        source = _source(url, "--url", concurrency, request_timeout)
        second = None
        if reference_url is not None:
            second = _source(reference_url, "--reference-url", concurrency, request_timeout)
        evaluation = _evaluate(suite, source, second, saved, str(reference or ""), console)
    except ProbeError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    write_result(out, evaluation)
    console.print(tables(evaluation), highlight=False)
    console.print(closing_line(evaluation), soft_wrap=True, highlight=False)
    console.print(f"Result: {out.resolve()}", soft_wrap=True, highlight=False)
    if evaluation.is_partial:
        failure = escape(evaluation.failure)
        console.print(f"[bold red]partial:[/] {failure}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _saved(reference: Path | None, reference_url: str | None, suite: Suite) -> Evaluation | None:
    """The result to compare with, checked before a server is asked."""
    if reference is None:
        return None
    if reference_url is not None:
        raise ProbeError("--reference and --reference-url: give one of them, not both")
    saved = read_result(reference)
    check_reference(saved, suite, f"--reference {reference}")
    return saved


def _source(url: str, option: str, concurrency: int, timeout_s: float) -> _Source:
    url = url.rstrip("/")
    model = asyncio.run(check_server(url, option, timeout_s))
    return _Source(url=url, model=model, concurrency=concurrency, timeout_s=timeout_s)


def _evaluate(
    suite: Suite,
    source: _Source,
    second: _Source | None,
    saved: Evaluation | None,
    saved_name: str,
    console: Console,
) -> Evaluation:
    answers = _answers(suite, source, console)
    failures = [answers.failure]
    theirs = saved.items if saved else ()
    if second is not None and not answers.failure:
        second_answers = _answers(suite, second, console)
        failures.append(f"reference: {second_answers.failure}" if second_answers.failure else "")
        theirs = second_answers.items
    comparison: tuple[Compared, ...] = ()
    if _have_common(answers.items, theirs):
        comparison = compare(answers.items, theirs)
    num_failed = sum(bool(item.error) for item in answers.items)
    if num_failed and not answers.failure:
        last = next(item.error for item in reversed(answers.items) if item.error)
        failures.append(f"{num_failed} requests failed, the last with: {last}")
    failure = "; ".join(filter(None, failures))
    rows = accuracies(answers.items)
    return Evaluation(
        url=source.url,
        model=source.model,
        seed=suite.seed,
        num_items=suite.num_items,
        tasks=suite.tasks,
        wall_s=answers.wall_s,
        is_partial=bool(failure),
        failure=failure,
        average=average(rows),
        accuracy=rows,
        reference=second.url if second else saved_name,
        comparison=comparison,
        items=answers.items,
    )


def _have_common(items: tuple[Graded, ...], theirs: tuple[Graded, ...]) -> bool:
    known = {(item.task, item.index) for item in theirs if not item.error}
    return any((item.task, item.index) in known for item in items if not item.error)


def _answers(suite: Suite, source: _Source, console: Console) -> _Answers:
    """Ask all, with a bar; what came before a failure or Ctrl-C is kept."""
    graded: dict[int, Graded] = {}
    start_s = time.monotonic()
    failure = ""
    with _bar(console) as progress:
        bar = progress.add_task(source.url, total=len(suite), share="")

        def note(place: int, item: Graded) -> None:
            graded[place] = item
            num_correct = sum(g.is_correct for g in graded.values())
            progress.update(bar, advance=1, share=f"{num_correct / len(graded):.1%} right")

        try:
            asyncio.run(
                ask(
                    source.url,
                    source.model,
                    suite,
                    concurrency=source.concurrency,
                    timeout_s=source.timeout_s,
                    on_graded=note,
                )
            )
        except ServerStoppedError as error:
            failure = f"{error} after {len(graded)} of {len(suite)} items"
        except KeyboardInterrupt:
            failure = f"interrupted after {len(graded)} of {len(suite)} items"
    items = tuple(graded[place] for place in sorted(graded))
    return _Answers(items=items, wall_s=time.monotonic() - start_s, failure=failure)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[share]}"),
        console=console,
    )


if __name__ == "__main__":
    typer.run(main)
