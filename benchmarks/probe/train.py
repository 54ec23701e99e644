"""Train the probe from scratch, then export it.

    python -m benchmarks.probe.train --out results --minutes 8

On one H100, 14 steps of 32,768 tokens a second; the last task is learnt after about 4 minutes.
Ends annealed after `--minutes` of steps, or after `--steps` for a run that does not depend on the
machine's speed; tests and export come on top (under a minute). `--pause-after` and interrupts leave
a checkpoint that `--resume` goes on from. Writes curve.jsonl, checkpoint.pt and model/ into --out.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.probe.attend import Backend
from benchmarks.probe.export import export
from benchmarks.probe.fit import Fit, Settings, append_line, read_checkpoint, take_over
from benchmarks.probe.loader import Loader, Plan, Source, Weights, make_fixed, open_loader
from benchmarks.probe.model import PLAIN, Ways
from benchmarks.probe.sizes import PRESETS

FIRST_TEST_INDEX = 1_000_000  # the published evaluation begins at zero
CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"
MODEL = "model"


def train(settings: Settings, source: Source, tasks: tuple[str, ...], *, resume: bool) -> bool:
    """Train to the end or to a pause; true when the probe was exported."""
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint = settings.out / CHECKPOINT
    state = read_checkpoint(checkpoint, settings) if resume and checkpoint.is_file() else None
    if state is None:
        (settings.out / CURVE).unlink(missing_ok=True)
    weights = Weights(len(tasks))
    for version in state["weights"] if state else [[1.0] * len(tasks)]:
        weights.append(version)
    plan = Plan(
        source=source,
        tasks=tasks,
        seed=settings.seed,
        batch_tokens=settings.batch_tokens,
        num_workers=settings.num_workers,
        interval=settings.interval,
        reuse=settings.reuse,
    )
    indices = range(FIRST_TEST_INDEX, FIRST_TEST_INDEX + settings.final_items)
    tests = make_fixed(source, tasks, "test", indices, settings.batch_tokens, settings.num_workers)
    few = make_fixed(
        source, tasks, "test", indices[: settings.test_items], settings.batch_tokens,
        settings.num_workers,
    )  # fmt: skip
    # The workers are forked before the device is touched.
    with open_loader(plan, weights, state["step"] if state else 0) as loader:
        fit = Fit(settings, tasks, weights)
        if settings.ways != PLAIN:
            print(fit.check_ways(few[0]), flush=True)
        if state:
            take_over(fit, state)
        done = Run(fit, loader, few).run()
    if done:
        finish(fit, tests)
    return done


class Run:
    """Steps with reports, tests and checkpoints until the end, a pause or an interrupt."""

    def __init__(self, fit: Fit, loader: Loader, few: list[dict[str, Any]]) -> None:
        self.fit, self.loader, self.few = fit, loader, few
        self.out = fit.settings.out
        self.stopped = False

    def run(self) -> bool:
        """True at the end, false when there is more to do; a checkpoint is written either way."""
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with _bar() as bar:
                self._loop(bar)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.fit.save(self.out / CHECKPOINT)
        return self.fit.progress >= 1.0

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _loop(self, bar: Progress) -> None:
        fit, settings = self.fit, self.fit.settings
        share = bar.add_task("training", total=1.0)
        begun = reported = saved = time.monotonic()
        already_s = fit.elapsed_s
        while fit.progress < 1.0 and not self.stopped:
            fit.train_step(self.loader)
            now = time.monotonic()
            fit.elapsed_s = already_s + now - begun
            bar.update(share, completed=min(1.0, fit.progress))
            if fit.step % settings.interval == 0:
                self._tell(fit.report(now - reported))
                reported = now
            due = fit.next_test <= settings.num_tests
            if due and fit.progress >= fit.next_test / (settings.num_tests + 1):
                fit.next_test += 1
                self._tell(fit.test(self.few))
            # Only at a report is nothing half counted, so that a resumed run tells the same.
            if fit.step % settings.interval == 0:
                if now - saved > settings.save_every_s:
                    fit.save(self.out / CHECKPOINT)
                    saved = now
                self.stopped |= now - begun > settings.pause_after_s

    def _tell(self, record: dict[str, Any]) -> None:
        append_line(self.out / CURVE, record)
        share = f"{100 * min(1.0, self.fit.progress):5.1f} %"
        if record["kind"] == "test":
            worst = min(record["accuracy"], key=record["accuracy"].get)
            print(
                f"{share} step {record['step']} TEST loss {record['loss']:.4f} accuracy "
                f"{record['mean_accuracy']:.3f}, worst {worst} {record['accuracy'][worst]:.3f}, "
                f"EP 8 skew {record['skew_ep8']}",
                flush=True,
            )
        elif record["step"] % (4 * self.fit.settings.interval) == 0:
            accuracy = sum(record["accuracy"].values()) / max(1, len(record["accuracy"]))
            print(
                f"{share} step {record['step']} loss {record['loss']:.4f} accuracy {accuracy:.3f} "
                f"{record['tokens_per_s'] / 1e3:.0f}k tokens/s {record['items_per_s']} items/s, "
                f"waiting for data {100 * record['data_wait_share']:.0f} %, for the device "
                f"{100 * record['device_wait_share']:.0f} %",
                flush=True,
            )


def _bar() -> Progress:
    """A bar under the lines of the log, on a terminal only."""
    console = Console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def finish(fit: Fit, tests: list[dict[str, Any]]) -> None:
    """The last test and the export."""
    final = fit.test(tests) | {"kind": "final"}
    append_line(fit.settings.out / CURVE, final)
    facts = {
        "seed": fit.settings.seed,
        "balance_loss": fit.settings.balance,
        "num_steps": fit.step,
        "seconds": round(fit.elapsed_s, 1),
        "device": torch.cuda.get_device_name() if fit.device.type == "cuda" else "cpu",
        "accuracy": final["accuracy"],
        "mean_accuracy": final["mean_accuracy"],
        "items_a_task": fit.settings.final_items,
    }
    export(fit.probe, fit.settings.out / MODEL, facts)
    width = max(map(len, final["accuracy"]))
    for task, accuracy in final["accuracy"].items():
        print(f"{task:{width}s} {accuracy:.3f}")
    print(f"{'mean':{width}s} {final['mean_accuracy']:.3f}  loss {final['loss']:.4f}", flush=True)


def parse(arguments: list[str] | None = None) -> tuple[Settings, bool]:
    """Settings from the command line, and whether to resume."""
    cuda = torch.cuda.is_available()
    default = Settings(out=Path())
    parser = argparse.ArgumentParser(description="Train the probe, then export it.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all results")
    add("--size", choices=PRESETS, default=default.size)
    add("--seed", type=int, default=default.seed)
    add("--minutes", type=float, default=default.minutes, help="of training, tests included")
    add("--steps", type=int, default=0, help="a fixed number of steps instead of minutes")
    add("--rate", type=float, default=default.rate, help="peak learning rate")
    add("--balance-loss", type=float, default=default.balance, help="weight; 0 for none")
    add("--adamw", action="store_true", help="AdamW for the matrices too, instead of Muon")
    add("--batch-tokens", type=int, default=default.batch_tokens)
    add("--interval", type=int, default=default.interval, help="steps between reports")
    add("--tests", type=int, default=default.num_tests, help="tests on the way")
    add("--test-items", type=int, default=default.test_items, help="of each task, on the way")
    add("--final-items", type=int, default=default.final_items, help="of each task, at the end")
    add("--workers", type=int, default=default.num_workers, help="processes that make items")
    add("--reuse", type=int, default=1, help="show each item this often, if making is too slow")
    add("--attention", choices=("varlen", "padded"), default="varlen" if cuda else "padded")
    add("--products", choices=("grouped", "loop"), default="grouped" if cuda else "loop")
    add("--compile", action="store_true", help="compile the layers: a minute, then faster steps")
    add("--device", default="cuda" if cuda else "cpu")
    add("--pause-after", type=float, default=None, help="minutes; leaves a checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args(arguments)
    attention: Backend = args.attention
    pause = args.pause_after
    settings = Settings(
        out=args.out,
        size=args.size,
        seed=args.seed,
        minutes=args.minutes,
        steps=args.steps,
        rate=args.rate,
        balance=args.balance_loss,
        muon=not args.adamw,
        batch_tokens=args.batch_tokens,
        interval=args.interval,
        num_tests=args.tests,
        test_items=args.test_items,
        final_items=args.final_items,
        num_workers=args.workers,
        reuse=args.reuse,
        compile=args.compile,
        ways=Ways(attention, args.products),
        device=args.device,
        pause_after_s=default.pause_after_s if pause is None else 60 * pause,
    )
    return settings, args.resume


def main() -> None:
    """Command line."""
    from benchmarks.probe.tasks import TASKS, make_item

    settings, resume = parse()
    torch.set_float32_matmul_precision("high")
    try:
        done = train(settings, make_item, tuple(TASKS), resume=resume)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"training: {error}") from error
    if not done:
        print(f"paused: go on with --resume --out {settings.out}", flush=True)


if __name__ == "__main__":
    main()
