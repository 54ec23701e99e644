"""`python -m sglang_moelb.demo`: stock SGLang against the controller, on a machine without a GPU.

Serves the repository's trained probe, a small Qwen3-VL-MoE, with three servers one after the other
(EP 2, through the stand-in for DeepEP): stock, the controller, and `drop` always. Asks them
questions with known answers about images and texts, shows them photographs too, and leaves a
report. A package without the repository has no
probe: a tiny model with random weights then gets real images and texts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from sglang_moelb.ab.arms import parse_arms, session_order
from sglang_moelb.ab.cli import execute
from sglang_moelb.ab.server import ServerError
from sglang_moelb.ab.types import AbError, Plan, Request
from sglang_moelb.ab.workload import demo_workload
from sglang_moelb.demo.models import write_model
from sglang_moelb.demo.probe import find_checkpoint, probe_workload

NUM_RANKS = 2
NUM_REQUESTS = 30
NUM_PROBE_REQUESTS = 100  # five of each task, and five with photographs
# The controller's defaults are for batches of thousands of tokens, of which the experts' time is a
# large part. A batch of the demo has hundreds, its experts take a tenth of a step on CPU, and all
# of it is over in a few dozen passes.
KNOBS = {
    "capacity": {"factor": 1.1, "min_batch_tokens": 64},
    "controller": {
        "window_passes": 8,
        "min_dwell_passes": 2,
        "min_gain": 0.002,
        "switch_margin": 0.001,
        "quality_budget": 0.05,
    },
}
# What the controller may find not worth its time here is shown by an arm that always does it.
ALWAYS = {"capacity": {"factor": 1.0, "min_batch_tokens": 64}, "controller": {"quality_budget": 1}}
# So that a pass holds what a few image requests bring: 1,024 tokens a rank.
COMMON_FLAGS = ("--chunked-prefill-size", str(1024 * NUM_RANKS))


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of another multimodal MoE model.",
            show_default="the trained probe of the repository, else a tiny random one",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the model and the report.")] = Path(
        "demo-out"
    ),
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests a round.",
            show_default=f"{NUM_PROBE_REQUESTS} with the probe, else {NUM_REQUESTS}",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each arm.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens a request, at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload and of the servers.")] = 0,
) -> None:
    """Compare stock SGLang with SGLang under the controller, on CPU, and write a report."""
    console = Console()
    arms = parse_arms(
        [
            "stock=",
            f"auto=--moelb-mode auto --moelb-config '{msgspec.json.encode(KNOBS).decode()}'",
            f"drop=--moelb-mode drop --moelb-config '{msgspec.json.encode(ALWAYS).decode()}'",
        ],
        [],
    )
    try:
        model, workload, requests = _content(model, num_requests, seed, out, console)
        plan = Plan(
            arms=arms,
            order=session_order(arms, "AB"),
            requests=requests,
            workload=workload,
            model=model,
            common_flags=COMMON_FLAGS,
            rounds=rounds,
            concurrency=8,
            max_tokens=max_tokens,
            num_warmup=8,
            seed=seed,
            out=out / "report",
            cpu=True,
            num_ranks=NUM_RANKS,
            argv=("python", "-m", "sglang_moelb.demo", *sys.argv[1:]),
        )
        passed = execute(plan, console)
    except (AbError, ServerError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    if not passed:
        raise typer.Exit(1)


def _content(
    model: str | None, num_requests: int | None, seed: int, out: Path, console: Console
) -> tuple[str, str, tuple[Request, ...]]:
    """The model, what the workload is called, and its requests. Raises `AbError`."""
    checkpoint = find_checkpoint() if model is None else None
    if checkpoint is not None:
        items = out / "probe-items.jsonl"
        count = num_requests or NUM_PROBE_REQUESTS
        return (
            str(checkpoint),
            "items of the probe, and photographs",
            probe_workload(count, seed=seed, out=items),
        )
    if model is None:
        console.print(
            "There is no trained probe beside this package, as there is in the repository: the "
            "demo serves a tiny model with random weights, whose answers cannot be judged.",
            style="yellow",
        )
        model = str(write_model("vl", out / "models" / "vl"))
    return model, "demo", demo_workload(num_requests or NUM_REQUESTS, seed=seed)


if __name__ == "__main__":
    typer.run(demo)
