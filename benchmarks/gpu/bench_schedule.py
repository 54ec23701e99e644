"""Mode `auto` on a schedule of changing loads, against every single mode.

    python3 -m benchmarks.gpu.bench_schedule --url http://127.0.0.1:21000 --skew-file /tmp/skew \
        --out schedule.jsonl

The server has memory for `replicate` and `downgrade` (`run_schedule.sh` starts it). It goes through
all phases four times: in mode `auto`, in each single mode in turn, the same with modes reversed,
and in `auto` again. In `auto` a phase begins with bursts in which the controller learns it; they
are in the rows, not in the table. Single modes have a quality budget of 1, so that they always act;
`auto` has `--quality-budget`. A phase's best single mode is the fastest whose loss of gate mass is
within that budget. Times are the device times of full passes that the status tells.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import aiohttp

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_prefill import VOCABULARY, burst, client, ids

SINGLE = ("none", "replicate", "downgrade", "expand", "drop")
LOSSY = ("downgrade", "expand", "drop")
SUFFICES = 1.02  # times the time of a lossy lever: within it an exact one is as good
RECORDS_S = 0.25  # until the last record of a burst is read
FULL = 0.9  # of a pass's tokens


@dataclass(frozen=True, slots=True)
class Phase:
    """A load as in `skew_plugin`; tiny passes are made by requests that come one a rank."""

    name: str
    load: str
    tiny: bool = False


PHASES = (
    Phase("balanced", "1"),
    Phase("text-only", "2"),
    Phase("vision-heavy", "2 vision=0.9"),
    Phase("tiny batches", "2", tiny=True),
    Phase("mixed", "1.5 vision=0.5"),
    Phase("balanced again", "1"),
)


def change_to(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The body of a request that switches to a mode."""
    budget = args.quality_budget if mode == "auto" else 1.0
    return {
        "mode": mode,
        "controller": {"quality_budget": budget},
        "capacity": {"factor": args.capacity_factor},
        "downgrade": {"factor": 1.0, "form": "rank"},
    }


async def status(session: aiohttp.ClientSession, args: argparse.Namespace) -> dict[str, Any]:
    """What the server says of itself."""
    async with session.get(f"{args.url}/moelb/status") as response:
        told: dict[str, Any] = await response.json()
    return told


async def switch(session: aiohttp.ClientSession, args: argparse.Namespace, mode: str) -> None:
    """Change the mode, and carry it in with small passes."""
    async with session.post(f"{args.url}/moelb/config", json=change_to(mode, args)) as response:
        if response.status != 200:
            raise SystemExit(f"{args.url}/moelb/config: {response.status} {await response.text()}")
    for _ in range(2):
        await burst(session, args.url, [[1, 2, 3]] * 4, 1)


async def serve(
    session: aiohttp.ClientSession, args: argparse.Namespace, phase: Phase, rng: random.Random
) -> tuple[float, int]:
    """One burst of a phase; seconds and prompt tokens."""
    if not phase.tiny:
        prompts = [ids(rng, args.tokens, args.vocabulary) for _ in range(args.requests)]
        return (await burst(session, args.url, prompts, 1))[0], args.requests * args.tokens
    seconds = 0.0
    for _ in range(args.waves):
        wave = [ids(rng, args.tiny_tokens, args.vocabulary) for _ in range(args.ranks)]
        seconds += (await burst(session, args.url, wave, 1))[0]
    return seconds, args.waves * args.ranks * args.tiny_tokens


async def block(
    session: aiohttp.ClientSession, args: argparse.Namespace, phase: Phase, mode: str, label: str
) -> dict[str, Any]:
    """One burst in a mode that is on, and what its full passes were."""
    Path(args.skew_file).write_text(f"{phase.load} | {label}")
    first = (await status(session, args))["num_passes"]
    seconds, tokens = await serve(session, args, phase, random.Random(args.seed))
    await asyncio.sleep(RECORDS_S)
    told = await status(session, args)
    size = args.ranks * (args.tiny_tokens if phase.tiny else args.pass_tokens)
    passes = [
        one for one in told["recent"]
        if one["step"] >= first and one["phase"] == "prefill"
        and FULL * size < sum(one["num_tokens_R"]) <= size
    ]  # fmt: skip
    return {
        "hardware": args.hardware,
        "commit": args.commit,
        "phase": phase.name,
        "load": phase.load,
        "mode": mode,
        "label": label,
        "tokens_per_pass_and_rank": size // args.ranks,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "step_ms": [one["step_ms"] for one in passes],
        "levers": [one["lever"] for one in passes],
        "lost_share": [one["lost_share"] for one in passes],
        "balance_after": [max(one["balance_after_L"]) for one in passes],
        "reasons": sorted({one["reason"] for one in passes}),
        "decision": told["controller"].get("last_decision"),
    }


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sweeps; prints a line a block of `auto`."""
    rows: list[dict[str, Any]] = []
    async with client() as session:
        for number, sweep in enumerate(("warm-up", "auto", "single", "reversed", "auto")):
            for phase in PHASES:
                modes = SINGLE[::-1] if sweep == "reversed" else SINGLE
                for mode in ("auto",) if sweep == "auto" else modes:
                    await switch(session, args, mode)
                    label = f"{phase.name}, {mode}"
                    for _ in range(args.settle if mode == "auto" else 0):
                        rows.append(await block(session, args, phase, mode, "learning"))
                    for _ in range(args.bursts if mode == "auto" else 1):
                        said = "warm-up" if sweep == "warm-up" else label
                        rows.append(await block(session, args, phase, mode, said))
                        rows[-1]["sweep"] = number
    return [row for row in rows if row["label"] != "warm-up"]


def of(rows: list[dict[str, Any]], mode: str, name: str) -> list[Any]:
    """A list of all measured passes in a mode."""
    return [x for r in rows if r["mode"] == mode and r["label"] != "learning" for x in r[name]]


def summary(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """One phase: times by mode, the best within the budget, and how `auto` compares with it."""
    ms = {mode: median(of(rows, mode, "step_ms")) for mode in SINGLE if of(rows, mode, "step_ms")}
    lost = {mode: fmean(of(rows, mode, "lost_share")) for mode in ms}
    best = min((mode for mode in ms if lost[mode] <= budget), key=lambda mode: ms[mode])
    auto_ms, levers = of(rows, "auto", "step_ms"), of(rows, "auto", "levers")
    needless = sum(lever in LOSSY and ms["replicate"] <= SUFFICES * ms[lever] for lever in levers)
    measured = [r for r in rows if r["label"] != "learning"]
    rates = {
        mode: median(r["tokens_per_s"] for r in measured if r["mode"] == mode)
        for mode in (*ms, "auto")
    }
    return {
        "ms": ms, "lost": lost, "best": best, "auto_ms": median(auto_ms),
        "ratio": ms[best] / median(auto_ms), "mean_ratio": fmean(of(rows, best, "step_ms"))
        / fmean(auto_ms), "levers": dict(Counter(levers)), "needless": needless, "rates": rates,
        "learning": dict(Counter(x for r in rows if r["label"] == "learning" for x in r["levers"])),
        "reasons": Counter(
            re.sub(r"-?[0-9]+(\.[0-9]+)?", "#", x)
            for r in rows if r["mode"] == "auto" for x in r["reasons"]
        ),
    }  # fmt: skip


def print_summary(rows: list[dict[str, Any]], budget: float) -> None:
    """The table of all phases."""
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase.name]
        if not of(own, "auto", "step_ms") or not of(own, "none", "step_ms"):
            print(f"{phase.name}: no full passes; are requests as long as passes are?")
            continue
        told = summary(own, budget)
        print(f"{phase.name} ({phase.load}): auto {told['auto_ms']:.2f} ms, best within the budget "
              f"{told['best']} {told['ms'][told['best']]:.2f}; auto has {told['ratio']:.3f} of its "
              f"throughput (means {told['mean_ratio']:.3f})")  # fmt: skip
        for mode in (*told["ms"], "auto"):
            time_ms = told["auto_ms"] if mode == "auto" else told["ms"][mode]
            lost = fmean(of(own, mode, "lost_share"))
            number = len(of(own, mode, "step_ms"))
            print(f"  {mode:10} {number:3} passes, median {time_ms:8.3f} ms, gate mass lost "
                  f"{lost:.4f}, bursts {told['rates'][mode]:9.0f} tok/s")  # fmt: skip
        print(f"  auto chose {told['levers']}, while it learnt {told['learning']}")
        for reason, number in told["reasons"].most_common(3):
            print(f"  reason, {number} times: {reason}")
        if told["needless"]:
            print(f"  NEEDLESS: a lossy lever in {told['needless']} passes though replicate is "
                  f"within {SUFFICES - 1:.0%}")  # fmt: skip


def main() -> None:
    """Measure, append the rows to a file and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32, help="in a burst of large passes")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt tokens of such a request")
    parser.add_argument("--pass-tokens", type=int, default=16384, help="of a full pass, a rank")
    parser.add_argument("--tiny-tokens", type=int, default=1024, help="of a tiny pass, a rank")
    parser.add_argument("--waves", type=int, default=16, help="tiny passes in a burst")
    parser.add_argument("--settle", type=int, default=6, help="bursts in which auto learns a phase")
    parser.add_argument("--bursts", type=int, default=2, help="bursts of auto measured a sweep")
    parser.add_argument("--quality-budget", type=float, default=0.05)
    parser.add_argument("--capacity-factor", type=float, default=1.25, help="of expand and drop")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="ids of prompts")
    parser.add_argument("--seed", type=int, default=7)
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    result_rows.append(rows, args.out)
    print_summary(rows, args.quality_budget)


if __name__ == "__main__":
    main()
