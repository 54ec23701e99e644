"""The commands `moelb replay` and `moelb synthesise`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from sglang_moelb.config import Config, ConfigError, ReplicateConfig, load, parse
from sglang_moelb.controller.verdict import line
from sglang_moelb.replay.arms import Options, chosen
from sglang_moelb.replay.controlled import decide_again
from sglang_moelb.replay.cost import Machine, machine_of
from sglang_moelb.replay.judged import verdict_on
from sglang_moelb.replay.result import ReplayResult, summarise
from sglang_moelb.replay.run import replay_trace, topology_at
from sglang_moelb.replay.table import summary
from sglang_moelb.replay.types import ReplayError
from sglang_moelb.trace.reader import Trace, open_trace
from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace
from sglang_moelb.trace.types import TraceError
from sglang_moelb.types import Topology

RESULT_NAME = "replay.json"


def replay(
    trace: Annotated[Path, typer.Argument(help="Folder or file of a trace.", show_default=False)],
    arms: Annotated[
        str, typer.Option(help="`basic`, `all`, or names with commas; `none` is always there.")
    ] = "basic",
    ep: Annotated[
        int | None,
        typer.Option(help="EP ranks, up to 256.", show_default="as traced"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the plots.")] = Path(
        "replay-out"
    ),
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Whose trace to read.", show_default="the lowest"),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration of arm auto, file or JSON.", show_default="the trace's"),
    ] = None,
    factor: Annotated[
        float, typer.Option(min=1e-6, max=1000, help="Capacity of the lossy arms, in mean rows.")
    ] = 1.25,
    eplb_window: Annotated[int, typer.Option(min=1, help="Passes that EPLB looks back on.")] = 100,
    eplb_interval: Annotated[int, typer.Option(min=1, help="Passes between its placements.")] = 100,
    eplb_redundant: Annotated[int, typer.Option(min=0, help="Its redundant experts.")] = 8,
    min_rows: Annotated[
        int, typer.Option(min=1, help="Fewest rows of a copy (replicate, LLEP, UltraEP).")
    ] = ReplicateConfig().min_rows,
    slots: Annotated[
        int, typer.Option(min=0, help="Slots of a rank (replicate, UltraEP).")
    ] = ReplicateConfig().slots,
    machine: Annotated[
        str | None,
        typer.Option(help="Constants of the cost model, file or JSON.", show_default="4 H100"),
    ] = None,
) -> None:
    """Replay a trace: what each balancing rule would have made of the very same passes.

    Writes replay.json and plots to OUT. The cost model was fitted on 4 H100 with experts of
    Qwen3-30B-A3B; give your own constants (fixed_ms, ms_per_row, ...) for other ones.
    """
    console = Console()
    try:
        opened = open_trace(trace, rank)
        options = Options(
            config=_config(opened, config),
            topology=topology_at(opened, ep),
            machine=Machine() if machine is None else machine_of(load(machine)),
            factor=factor,
            eplb_window=eplb_window,
            eplb_interval=eplb_interval,
            eplb_redundant=eplb_redundant,
            min_rows=min_rows,
            num_slots=slots,
        )
        result = _replayed(opened, chosen(arms), options)
        left_out = _write(out, result)
    except (TraceError, ReplayError, ConfigError) as error:
        raise _failed(console, error) from error
    console.print(summary(result))
    console.print(f"Written to {out.resolve()}{left_out}", soft_wrap=True, highlight=False)


def synthesise(
    out: Annotated[Path, typer.Argument(help="New folder of the trace.", show_default=False)],
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 48,
    experts: Annotated[int, typer.Option(help="Logical experts.")] = 128,
    ranks: Annotated[int, typer.Option(help="EP ranks.")] = 4,
    topk: Annotated[int, typer.Option(help="Experts a token.")] = 8,
    passes: Annotated[int, typer.Option(help="Prefill passes.")] = 200,
    tokens: Annotated[int, typer.Option(help="Mean tokens of a rank and pass.")] = 4096,
    alpha: Annotated[
        float, typer.Option(help="Exponent of the power law of experts' rows; 0: equal.")
    ] = 1.01,
    drift: Annotated[
        float, typer.Option(help="How fast hot spots move: 0 never, 1 every pass.")
    ] = 0.1,
    vision_share: Annotated[float, typer.Option(help="Vision tokens, of all.")] = 0.5,
    protected_share: Annotated[
        float, typer.Option(help="Tokens of requests that refuse lossy levers, of all.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same trace.")] = 0,
) -> None:
    """Write a synthetic trace: a load of any size with the skew, mix and drift asked for."""
    console = Console()
    try:
        load = SyntheticLoad(
            topology=Topology(num_layers=layers, num_experts=experts, num_ranks=ranks, topk=topk),
            num_passes=passes,
            tokens_per_rank=tokens,
            alpha=alpha,
            drift=drift,
            vision_share=vision_share,
            protected_share=protected_share,
            seed=seed,
        )
        synthesise_trace(out, load)
    except TraceError as error:
        raise _failed(console, error) from error
    console.print(f"{passes} passes written to {out.resolve()}", soft_wrap=True, highlight=False)


def _config(trace: Trace, given: str | None) -> Config:
    return trace.config if given is None else parse(load(given))


def _replayed(trace: Trace, names: tuple[str, ...], options: Options) -> ReplayResult:
    replayed = replay_trace(trace, names, options)
    verdict = line(verdict_on(trace, options.machine))
    return summarise(trace, options, replayed, decide_again(trace), verdict)


def _write(out: Path, result: ReplayResult) -> str:
    """Write the files to `out`; returns what was left out and why, to be told, or ""."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(result), indent=1)
        (out / RESULT_NAME).write_bytes(text)
        if find_spec("matplotlib") is None:
            return ", without plots (pip install 'sglang-moelb[ab]' for them)"
        from sglang_moelb.replay.plots import write_plots  # needs matplotlib: half a second

        write_plots(out, result)
    except OSError as error:
        raise ReplayError(
            f"--out {out}: cannot be written ({error.strerror}). Give a folder you may write to."
        ) from error
    return ""


def _failed(console: Console, error: Exception) -> typer.Exit:
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)
