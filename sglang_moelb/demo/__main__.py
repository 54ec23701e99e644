"""`python -m sglang_moelb.demo`: stock SGLang against the controller, on a machine without a GPU.

Writes a tiny Qwen3-VL-MoE once, serves real images and texts with two servers one after the other
(EP 2, through the stand-in for DeepEP), and leaves a report.
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
from sglang_moelb.ab.types import AbError, Plan
from sglang_moelb.ab.workload import demo_workload
from sglang_moelb.demo.models import write_model

NUM_RANKS = 2
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
# So that a pass holds what a few image requests bring: 1,024 tokens a rank.
COMMON_FLAGS = ("--chunked-prefill-size", str(1024 * NUM_RANKS))


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or id of another multimodal MoE model.",
            show_default="a tiny Qwen3-VL-MoE, written to OUT/models",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the model and the report.")] = Path(
        "demo-out"
    ),
    num_requests: Annotated[int, typer.Option(min=1, help="Requests a round.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each arm.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens a request, at most.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload and of the servers.")] = 0,
) -> None:
    """Compare stock SGLang with SGLang under the controller, on CPU, and write a report."""
    console = Console()
    arms = parse_arms(
        [
            "stock=",
            f"auto=--moelb-mode auto --moelb-config '{msgspec.json.encode(KNOBS).decode()}'",
        ],
        [],
    )
    try:
        plan = Plan(
            arms=arms,
            order=session_order(arms, "AB"),
            requests=demo_workload(num_requests, seed=seed),
            workload="demo",
            model=model or str(write_model("vl", out / "models" / "vl")),
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


if __name__ == "__main__":
    typer.run(demo)
