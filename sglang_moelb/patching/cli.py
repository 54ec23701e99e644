"""`moelb patch status | apply | revert`: the command line over `operations`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sglang_moelb.patching.diff import PatchError
from sglang_moelb.patching.operations import PatchStatus, State, apply, revert, status

app = typer.Typer(
    no_args_is_help=True,
    help="Put our calls into the installed SGLang's source, take them out, or see how it stands.",
)
SiteOption = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="DIR",
        help="Folder that holds sglang/ and its .dist-info [default: this interpreter's].",
    ),
]
_NEXT = {
    State.PRISTINE: "as its wheel; `moelb patch apply` patches it",
    State.APPLIED: "all patches applied; `moelb patch revert` takes them out",
    State.OUTDATED: "another set of patches; run `moelb patch revert`, then apply",
    State.HALF_APPLIED: "half-applied; run `moelb patch revert`, then apply",
    State.MODIFIED: "changed by someone else; reinstall sglang before patching",
}


def _run(operation: Callable[[Path | None], PatchStatus], site: Path | None) -> PatchStatus:
    try:
        return operation(site)
    except PatchError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error


def _say(result: PatchStatus) -> None:
    line = f"sglang {result.version} in {result.site}: {result.state}, {_NEXT[result.state]}"
    Console(soft_wrap=True).print(line, markup=False, highlight=False)


@app.command("status")
def status_command(site: SiteOption = None) -> None:
    """Show the state of every file that the patches touch. Exit 1 when it needs attention."""
    result = _run(status, site)
    table = Table("file", "state")
    for path, state in result.files.items():
        table.add_row(path, state.value)
    Console().print(table)
    _say(result)
    if result.state not in (State.PRISTINE, State.APPLIED):
        raise typer.Exit(1)


@app.command("apply")
def apply_command(site: SiteOption = None) -> None:
    """Apply all patches; does nothing where they are applied already."""
    _say(_run(apply, site))


@app.command("revert")
def revert_command(site: SiteOption = None) -> None:
    """Restore the files of the wheel; does nothing where they are."""
    _say(_run(revert, site))
