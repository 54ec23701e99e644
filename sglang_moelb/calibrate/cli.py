"""The command `moelb calibrate`.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_moelb.calibrate.run import Bars, Wanted, calibrate_trace
from sglang_moelb.calibrate.source import open_source
from sglang_moelb.calibrate.table import summary
from sglang_moelb.calibrate.types import CalibrateError
from sglang_moelb.placement import AIMS, Placement, PlacementError, num_slots_of
from sglang_moelb.stored_formats import refusal_of
from sglang_moelb.trace.types import TraceError
from sglang_moelb.types import IntArray

Traced = Annotated[
    str,
    typer.Argument(
        metavar="TRACE|URL",
        help="Folder or file of a trace, or the URL of a server on this machine that traces.",
        show_default=False,
    ),
]
Model = Annotated[
    Path,
    typer.Option(help="Folder of the bfloat16 checkpoint (*.safetensors).", show_default=False),
]
Aim = Annotated[
    str,
    typer.Option(
        help="`experts`: copy the busiest expert (R&Q, lowest LIS); `ranks`: make the copy that "
        "spares the busiest rank most."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="How low experts are stored: `fp8`, or `mxfp4`: weights of 4 bits under rows as they "
        "are, about half the bytes, and coarser."
    ),
]
Kept = Annotated[
    float,
    typer.Option(help="Share of a rank's experts of a layer, the most important, that stays high."),
]
Budget = Annotated[
    float,
    typer.Option(help="Bytes of experts on a rank, as a share of those before, above 0 to 1."),
]
Measure = Annotated[
    str, typer.Option(help="`wanda` (from the checkpoint), or FILE of a measured importance.")
]
TracedRank = Annotated[
    int | None, typer.Option(min=0, help="Whose trace to read.", show_default="the lowest")
]


def calibrate(
    trace: Traced,
    model: Model,
    out: Annotated[Path, typer.Option(help="The placement file; a picture goes beside it.")] = Path(
        "placement.json"
    ),
    share: Annotated[
        float, typer.Option(help="Share of the prefill passes to calibrate on, above 0 to 1.")
    ] = 0.1,
    slots: Annotated[
        int, typer.Option(min=0, max=32, help="Replicas that a rank may hold in each layer.")
    ] = 2,
    budget: Budget = 1.0,
    keep: Kept = 0.5,
    importance: Measure = "wanda",
    aim: Aim = "experts",
    low_format: Format = "fp8",
    ep: Annotated[
        int | None, typer.Option(help="EP ranks of the server to be.", show_default="as traced")
    ] = None,
    rank: TracedRank = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key of the server at URL.", show_default="none")
    ] = None,
) -> None:
    """Write a placement file: lasting replicas of hot experts, paid for by cold ones stored low.

    Reads a share of a trace, judges the placement by the rest, and prints the load before and
    after by layer. A server takes the file at start: --moelb-config '{"resident": {"placement":
    FILE}}'. Outputs change slightly: replicas and the least important experts are stored in fp8, or
    in 4 bits.
    """
    console = Console()
    try:
        wanted = _wanted(model, share, slots, budget, keep, importance, aim, low_format, ep)
        opened = open_source(trace, rank, api_key)
        with _progress(console) as bars:
            placement, rows_LE = calibrate_trace(opened, wanted, bars)
        _write(out, placement.to_json())
        also = _draw(out, placement, rows_LE)
    except (CalibrateError, PlacementError, TraceError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(summary(placement))
    used = num_slots_of(placement.layers, placement.sizes.num_ranks)
    if used < slots:
        console.print(
            f"{used} of {slots} slots are used: what may be stored low pays for no more (--keep), "
            "or no more copies would help."
        )
    console.print(f"Written to {out.resolve()}{also}", soft_wrap=True, highlight=False)


def _wanted(
    model: Path,
    share: float,
    slots: int,
    budget: float,
    keep: float,
    importance: str,
    aim: str,
    low_format: str,
    ep: int | None,
) -> Wanted:
    """The options in one; `CalibrateError` names the one that is wrong."""
    for name, value, fits in (
        ("--share", share, 0 < share <= 1),
        ("--budget", budget, 0 < budget <= 1),
        ("--keep", keep, 0 <= keep <= 1),
    ):
        if not fits:
            raise CalibrateError(f"{name} {value:g}: must be a share, at most 1 and above 0.")
    if aim not in AIMS:
        raise CalibrateError(f"--aim {aim}: use one of {', '.join(AIMS)}.")
    if refusal := refusal_of(low_format):
        raise CalibrateError(f"--format {low_format}: {refusal}.")
    return Wanted(
        model=model,
        share=share,
        num_slots=slots,
        budget_share=budget,
        keep_share=keep,
        importance=None if importance == "wanda" else Path(importance),
        aim=aim,
        low_format=low_format,
        num_ranks=ep,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Bars]:
    """A bar for each part of the work; gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:

        def begin(what: str, total: int | None) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        yield begin


def _write(out: Path, text: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text)
    except OSError as error:
        raise _unwritable(out, error) from error


def _draw(out: Path, placement: Placement, rows_LE: IntArray) -> str:
    """Draw the picture beside `out`; what was written, or why not, to be told."""
    if find_spec("matplotlib") is None:
        return ", without a picture (pip install 'sglang-moelb[ab]' for it)"
    from sglang_moelb.calibrate.plots import write_picture  # needs matplotlib: half a second

    path = out.with_suffix(".png")
    try:
        write_picture(path, placement, rows_LE)
    except OSError as error:
        raise _unwritable(path, error) from error
    return f", picture to {path.name}"


def _unwritable(path: Path, error: OSError) -> CalibrateError:
    return CalibrateError(
        f"--out {path}: cannot be written ({error.strerror}). Give a file in a folder of yours."
    )
