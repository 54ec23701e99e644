"""The command `moelb doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from sglang_moelb.doctor.judge import judge
from sglang_moelb.doctor.probe import probe
from sglang_moelb.doctor.show import json_of, table_of


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print facts and rows as JSON, for programs.")
    ] = False,
) -> None:
    """Say what is installed, which seams hold, what hardware there is and what would work.

    Exit code 0 if a server with the plugin can run here, on CPU or on GPUs, 1 if not.
    """
    facts = probe()
    report = judge(facts)
    if as_json:
        typer.echo(json_of(facts, report))
    else:
        Console().print(table_of(report))
    if not report.can_run:
        raise typer.Exit(1)
