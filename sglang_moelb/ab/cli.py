"""The command `moelb ab`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from sglang_moelb.ab.arms import parse_arms, session_order
from sglang_moelb.ab.compare import compare_runs
from sglang_moelb.ab.conditions import conditions, cuda_visible, load_average
from sglang_moelb.ab.progress import RichProgress
from sglang_moelb.ab.report import write_report
from sglang_moelb.ab.run import run_plan
from sglang_moelb.ab.server import ServerError, pick_port
from sglang_moelb.ab.table import summary
from sglang_moelb.ab.types import AbError, Plan, Request
from sglang_moelb.ab.workload import DEFAULT_SIDE_PX, demo_workload
from sglang_moelb.ab.workload_file import file_workload

DEMO = "demo"
DEFAULT_NUM_REQUESTS = 32


def ab(
    flags: Annotated[
        list[str] | None,
        typer.Argument(help="After --: server flags common to all arms.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of the model.", show_default="a tiny Qwen3-VL-MoE, written to OUT"
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FLAGS: an arm and its own server flags; repeat it. The first arm is what "
            "the others are compared with.",
            show_default="stock= and 'auto=--moelb-mode auto'",
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL: an arm that is a running server; repeat it."),
    ] = None,
    workload: Annotated[
        str, typer.Option(help="`demo` (real images and texts) or a JSONL file, with answers too.")
    ] = DEMO,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests a round.", show_default=f"{DEFAULT_NUM_REQUESTS}, or the file's"
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens a request, at most.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds a session of an arm.")] = 3,
    warmup: Annotated[
        int, typer.Option(min=1, help="Requests before the rounds that do not count.")
    ] = 8,
    order: Annotated[
        str,
        typer.Option(
            help="AB drives each arm once; ABBA forth and back, which cancels a drift of the "
            "machine and starts servers again."
        ),
    ] = "AB",
    seed: Annotated[int, typer.Option(min=0, help="Of the workload and of the servers.")] = 0,
    image_side: Annotated[
        int, typer.Option(min=32, help="Longer side of the largest demo images, px.")
    ] = DEFAULT_SIDE_PX,
    out: Annotated[
        Path, typer.Option(help="Folder of the report, plots, logs and records.")
    ] = Path("ab-out"),
    cpu: Annotated[
        bool | None,
        typer.Option(
            "--cpu/--gpu",
            help="Start servers on CPU, with a stand-in for DeepEP, or on GPUs.",
            show_default="--cpu where torch sees no CUDA device",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(help="EP ranks with --cpu: 2, 4 or 8.")] = 2,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the servers started.", show_default="a free one"
        ),
    ] = None,
    ready_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a server to get ready.")
    ] = 300.0,
    request_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one request, at most.")
    ] = 120.0,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            help="Keep the prefix cache in servers started here. It answers later rounds in part."
        ),
    ] = False,
) -> None:
    """Serve the same requests with two or more SGLang servers, compare, and write a report.

    Servers are started one after the other and ended again. The report shows throughput, latency,
    agreement of the answers, and for servers with the plugin the balance of their MoE layers and
    what its controller did. Exit code 1 if an arm did not finish or a request failed.
    """
    console = Console()
    try:
        arms = parse_arms(arm or (), url or ())
        on_cpu = not cuda_visible() if cpu is None else cpu
        if port is not None:
            pick_port(port)
        plan = Plan(
            arms=arms,
            order=session_order(arms, order),
            requests=_requests(workload, num_requests, seed, image_side),
            workload=workload,
            model=_model(model, any(a.url is None for a in arms), out),
            common_flags=_common(flags or []),
            rounds=rounds,
            concurrency=concurrency,
            max_tokens=max_tokens,
            num_warmup=warmup,
            seed=seed,
            out=out,
            cpu=on_cpu,
            num_ranks=ranks,
            port=port,
            ready_timeout_s=ready_timeout,
            request_timeout_s=request_timeout,
            prefix_cache=prefix_cache,
            argv=("moelb", *sys.argv[1:]),
        )
        passed = execute(plan, console)
    except (AbError, ServerError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    if not passed:
        raise typer.Exit(1)


def _requests(
    workload: str, num_requests: int | None, seed: int, image_side_px: int
) -> tuple[Request, ...]:
    if workload == DEMO:
        return demo_workload(
            num_requests or DEFAULT_NUM_REQUESTS, seed=seed, image_side_px=image_side_px
        )
    return file_workload(Path(workload), num_requests)


def _model(model: str | None, must_start: bool, out: Path) -> str:
    if model is not None or not must_start:
        return model or "default"
    from sglang_moelb.demo.models import write_model  # needs torch and transformers: seconds

    return str(write_model("vl", out / "models" / "vl"))


def _common(flags: list[str]) -> tuple[str, ...]:
    if flags and not flags[0].startswith("-"):
        raise AbError(
            f"{flags[0]!r} is not a flag. Server flags of all arms go after --, "
            "e.g. moelb ab -- --context-length 4096"
        )
    return tuple(flags)


def execute(plan: Plan, console: Console) -> bool:
    """Run `plan` and write its report; whether every arm finished and no request failed.

    Raises `AbError` and `ServerError`.
    """
    load_before = load_average()
    plan.out.mkdir(parents=True, exist_ok=True)
    with RichProgress(plan, console) as progress:
        runs = run_plan(plan, progress)
    result = compare_runs(runs, plan.requests, conditions(plan, load_before))
    page = write_report(plan.out, runs, result)
    console.print(summary(result))
    console.print(f"Report: {page.resolve()}", soft_wrap=True, highlight=False)
    return not any(a.failure or a.failures for a in result.arms)
