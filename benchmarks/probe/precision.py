"""What low precision costs the probe: a real server, the lever off, by its rule and always.

    python -m benchmarks.probe.precision --device cuda --out rows.jsonl       # GPUs: 2, or 1 shared
    python -m benchmarks.probe.precision --device cpu --items 380 --out rows.jsonl

For each format a server starts with room for the lever, on two expert-parallel ranks, and is asked
the probe's test items four times: off, off once more (what is left is the noise of batches), by
ReaLB's rule (factor 1, vision share 0.7), and always (any rank with more than a millionth of the
mean load and a vision row). Text and images are in flight together, so that text-only requests meet
lowered experts in their batches; they are counted separately. Two ways: `served`, answers are
generated; `prefilled`, answers are teacher-forced
(`benchmarks/probe/force.py`), so that nothing is decoded. One row a format, way, setting and group,
against the first run with the lever off. `--table rows.jsonl` prints rows as Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.probe.compare import compare
from benchmarks.probe.force import ask_forced
from benchmarks.probe.precision_rows import rows_of, table
from benchmarks.probe.result import Evaluation, accuracies, read_result
from benchmarks.probe.serving import MODEL, NUM_RANKS, ROOT, Server, serving
from benchmarks.probe.suite import Suite
from benchmarks.probe.tasks import TASKS

WAYS = ("served", "prefilled")
FORMATS = ("fp8", "nvfp4-emulated", "mxfp4-emulated")
ALWAYS = {"factor": 1e-6, "vision_share": 0.0}
RULE = {"factor": 1.0, "vision_share": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"mode": "none"},
    "off again": {"mode": "none"},
    "by rule": {"mode": "downgrade", "downgrade": RULE},
    "always": {"mode": "downgrade", "downgrade": ALWAYS},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """How the server is asked."""

    device: str
    num_items: int
    num_warmup: int
    concurrency: int
    folder: Path
    commit: str
    ways: tuple[str, ...]


def evaluate(server: Server, asked: Asked, out: Path, reference: Path | None) -> Evaluation:
    """The test items, once; compared with `reference`, if given."""
    command = [sys.executable, "-m", "benchmarks.probe.evaluate", "--url", server.url]
    command += ["--items", str(asked.num_items), "--concurrency", str(asked.concurrency)]
    command += ["--out", str(out), "--request-timeout", "600"]
    command += [] if reference is None else ["--reference", str(reference)]
    with (asked.folder / "evaluate.log").open("ab") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"the evaluation failed, {asked.folder / 'evaluate.log'}")
    return read_result(out)


def evaluate_forced(server: Server, asked: Asked, reference: Evaluation | None) -> Evaluation:
    """The test items, once, with their answers in the prompt; compared with `reference`."""
    suite = Suite(num_items=asked.num_items, seed=0, tasks=tuple(TASKS))
    start_s = time.monotonic()
    asking = ask_forced(server.url, suite, concurrency=asked.concurrency, timeout_s=3600)
    items = tuple(asyncio.run(asking))
    return Evaluation(
        url=server.url, model=str(MODEL), seed=0, num_items=len(items), tasks=suite.tasks,
        wall_s=time.monotonic() - start_s, is_partial=False, failure="", average=None,
        accuracy=accuracies(items), items=items,
        comparison=compare(items, reference.items) if reference else (),
    )  # fmt: skip


def measure(name: str, asked: Asked) -> Iterator[dict[str, Any]]:
    """Rows of one format."""
    start_s = time.monotonic()
    first = asked.folder / f"{name}-off.json"
    forced_first: Evaluation | None = None
    with serving(name, asked.device, asked.folder) as server:
        if asked.num_warmup:  # kernels are compiled at their first use
            server.call("/moelb/config", SETTINGS["always"])
            warmup = replace(asked, num_items=asked.num_warmup)
            evaluate(server, warmup, asked.folder / "warmup.json", None)
        for setting, changes in SETTINGS.items():
            server.call("/moelb/config", changes)
            for way in asked.ways:
                before = _settled(server)
                if way == "served":
                    out = asked.folder / f"{name}-{setting.replace(' ', '-')}.json"
                    found = evaluate(server, asked, out, None if setting == "off" else first)
                else:
                    found = evaluate_forced(server, asked, forced_first)
                    forced_first = forced_first or found
                told = {"op": "probe_precision", "format": name, "way": way, "setting": setting,
                        **conditions(asked),
                        "low_share": low_share(before, _settled(server), found)}  # fmt: skip
                yield from (told | row for row in rows_of(found))
                print(f"{time.monotonic() - start_s:.0f} s: {name}, {setting}, {way}", flush=True)


def conditions(asked: Asked) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    name = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    num_gpus = min(torch.cuda.device_count(), NUM_RANKS)
    return {"device": name, "num_gpus": num_gpus, "num_ranks": NUM_RANKS,
            "concurrency": asked.concurrency, "commit": asked.commit}  # fmt: skip


def _settled(server: Server) -> dict[str, Any]:
    """The status once all passes are counted."""
    for _ in range(100):
        status = server.call("/moelb/status")
        if status["totals"]["num_passes"] == status["controller"]["num_passes"]:
            return status
        time.sleep(0.05)
    return server.call("/moelb/status")


def low_share(before: dict[str, Any], after: dict[str, Any], found: Evaluation) -> float:
    """Rows at low precision as a share of the prompts' rows in all MoE layers.

    Decode rows that run low in a pass of prompts are among the former only.
    """
    num_low = after["totals"]["num_low_rows"] - before["totals"]["num_low_rows"]
    topology = after["topology"]
    num_tokens = sum(item.num_prompt_tokens for item in found.items)
    return float(num_low / (num_tokens * topology["topk"] * topology["num_layers"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print, or print what was measured."""
    parser = argparse.ArgumentParser(description="What low precision costs the probe.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="JSON lines file to write; logs go beside it")
    parser.add_argument("--commit", default="", help="of this checkout, for the rows")
    parser.add_argument("--table", type=Path, help="JSON lines file to print, and do nothing else")
    args = parser.parse_args(argv)
    if args.table:
        print(table([json.loads(line) for line in args.table.open()]))
        return
    if args.out is None:
        parser.error("--out is missing: give the JSON lines file to write")
    folder = args.out.resolve().with_suffix(".d")
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    asked = Asked(
        device=args.device,
        num_items=args.items,
        num_warmup=300 if on_gpu else 0,
        concurrency=128 if on_gpu else 16,
        folder=folder,
        commit=args.commit,
        ways=tuple(args.ways),
    )
    rows: list[dict[str, Any]] = []
    for name in args.formats:
        for row in measure(name, asked):
            rows.append(row)
            args.out.write_text("".join(json.dumps(one) + "\n" for one in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
