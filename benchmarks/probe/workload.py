"""Test items of the probe as a workload file of `moelb ab`, with answers, grouped by task.

    python -m benchmarks.probe.workload --items 190 --seed 0 --out probe.jsonl
    moelb ab --model benchmarks/probe/checkpoint --workload probe.jsonl

One request a line; images are PNG data URLs in it. Equal arguments give an equal file on a machine
with the same Pillow. Host only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.probe.suite import ProbeError, Suite, parse_tasks, to_request


def main(
    out: Annotated[Path, typer.Option(help="The file to write, JSON lines.")],
    items: Annotated[int, typer.Option(min=1, help="How many, the tasks taking turns.")] = 190,
    seed: Annotated[int, typer.Option(min=0, help="Which test items.")] = 0,
    tasks: Annotated[str, typer.Option(help="Names separated by commas.", show_default="all")] = "",
) -> None:
    """Write test items of the probe as requests with their answers. Exit code 2 if it cannot."""
    console = Console()
    try:
        suite = Suite(num_items=items, seed=seed, tasks=parse_tasks(tasks))
        write(out, suite)
    except ProbeError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    console.print(f"{items} requests: {out}", soft_wrap=True, highlight=False)


def write(out: Path, suite: Suite) -> None:
    """Write every item of `suite` to `out`. Raises `ProbeError` if the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows(suite)))
    except OSError as error:
        raise ProbeError(
            f"--out {out}: cannot be written ({error.strerror}). Give a file in a folder of yours."
        ) from error


def rows(suite: Suite) -> Iterator[dict[str, Any]]:
    """One object a request, as `sglang_moelb.ab.workload_file` reads it."""
    for i in range(len(suite)):
        item = suite[i]
        messages = to_request(item.parts, i).messages
        yield {"messages": messages, "answer": item.answer, "group": item.task}


if __name__ == "__main__":
    typer.run(main)
