"""Reads the verdict of a running server at several skews, follows it, and measures what it brings.

    python3 -m benchmarks.gpu.follow_verdict --url http://127.0.0.1:31000 --skew-file /tmp/skew \
        --skews 1,1.5,2 --out verdict.jsonl

At each skew the server serves bursts in mode observe until it has a verdict. Then bursts in observe
and with the lever that it recommends, or where it recommends none the one with the best expected
gain, alternate in an order that reverses (A B B A). One JSON row a skew: what was forecast, with
its interval, and what was measured, by throughput and by the time of passes. Exits with 1 where a
measured effect of more than 2 %, on which bursts agree, has not the sign that was forecast.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_prefill import VOCABULARY, burst, client

TRUE_EFFECT = 0.02
LOG_INTERVAL_S = 1.0  # the verdict is made anew as often


def prompts(args: argparse.Namespace, rng: random.Random) -> list[list[int]]:
    """The prompts of one burst."""
    return [
        [rng.randrange(1, args.vocabulary) for _ in range(args.tokens)]
        for _ in range(args.requests)
    ]


async def change(session: aiohttp.ClientSession, args: argparse.Namespace, body: Any) -> None:
    """Change the configuration, and a small pass that carries it in."""
    async with session.post(f"{args.url}/moelb/config", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{args.url}/moelb/config: {response.status} {await response.text()}")
    await burst(session, args.url, [[1, 2, 3]] * 4, 1)


async def status(session: aiohttp.ClientSession, args: argparse.Namespace) -> dict[str, Any]:
    """What the server says of itself."""
    async with session.get(f"{args.url}/moelb/status") as response:
        told: dict[str, Any] = await response.json()
    return told


async def verdict(
    session: aiohttp.ClientSession, args: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    """The verdict on bursts in mode observe, of a score that begins here."""
    body = {
        "mode": "observe",
        "capacity": {"factor": args.factor},
        "controller": {"quality_budget": 1.0},
        "verdict": {"enabled": False},
    }
    await change(session, args, body)
    await burst(session, args.url, prompts(args, rng), 1)  # the skew's first pass may compile
    judging = {"enabled": True, "log_interval_s": LOG_INTERVAL_S}
    await change(session, args, {"verdict": judging})
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < args.observe_s:
        await burst(session, args.url, prompts(args, rng), 1)
        told = (await status(session, args))["verdict"]
        if told and told["scores"] and time.monotonic() - begun_s >= args.least_s:
            return {**told, "observed_s": time.monotonic() - begun_s}
    raise SystemExit(f"no verdict after {args.observe_s} s: {(await status(session, args))}")


async def measured(
    session: aiohttp.ClientSession, args: argparse.Namespace, mode: str, rng: random.Random
) -> dict[str, Any]:
    """Throughput of one burst in `mode`, and the median time of its full passes."""
    await change(session, args, {"mode": mode})
    first = (await status(session, args))["num_passes"]
    seconds, _ = await burst(session, args.url, prompts(args, rng), 1)
    await asyncio.sleep(args.settle_s)  # until the last record is read
    passes = [one for one in (await status(session, args))["recent"] if one["step"] >= first]
    most = max((sum(one["num_tokens_R"]) for one in passes), default=0)
    full = [one for one in passes if sum(one["num_tokens_R"]) > 0.9 * most]
    return {
        "tokens_per_s": args.requests * args.tokens / seconds,
        "step_ms": median(one["step_ms"] for one in full) if full else 0.0,
        "levers": sorted({one["lever"] for one in full}),
    }


def turns(mode: str, num_pairs: int) -> Iterator[str]:
    """observe, mode, mode, observe, ..."""
    for pair in range(num_pairs):
        yield from ("observe", mode) if pair % 2 == 0 else (mode, "observe")


async def follow(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each skew."""
    rows = []
    async with client() as session:
        for skew in args.skews.split(","):
            Path(args.skew_file).write_text(skew)
            rng = random.Random(float(skew))
            told = await verdict(session, args, rng)
            scores = told["scores"]
            lever = told["lever"]
            if lever == "none":
                lever = max(scores, key=lambda name: scores[name]["gain"])
            await measured(session, args, lever, rng)  # its kernels may compile
            bursts = [(m, await measured(session, args, m, rng)) for m in turns(lever, args.pairs)]
            rows.append(row(args, float(skew), told, lever, bursts))
            print(told["text"], flush=True)
    return rows


def row(
    args: argparse.Namespace,
    skew: float,
    told: dict[str, Any],
    lever: str,
    bursts: list[tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """What was forecast and what was measured."""

    def of(mode: str, name: str) -> list[float]:
        return [found[name] for at, found in bursts if at == mode]

    rate, step = (
        {mode: median(of(mode, name)) for mode in ("observe", lever)}
        for name in ("tokens_per_s", "step_ms")
    )
    return {
        "hardware": args.hardware,
        "commit": args.commit,
        "skew": skew,
        "factor": args.factor,
        "requests": args.requests,
        "tokens": args.tokens,
        "verdict": told,
        "followed": lever,
        "predicted": [told["scores"][lever][name] for name in ("gain", "gain_low", "gain_high")],
        "faster_pairs": faster(of(lever, "tokens_per_s"), of("observe", "tokens_per_s")),
        "measured_by_throughput": 1.0 - rate["observe"] / rate[lever],
        "measured_by_step": 1.0 - step[lever] / step["observe"] if step["observe"] else 0.0,
        "bursts": [{"mode": mode, **found} for mode, found in bursts],
    }


def faster(with_lever: list[float], without: list[float]) -> float:
    """Share of pairs of bursts in which the one with the lever was the faster."""
    pairs = [rate > other for rate in with_lever for other in without]
    return sum(pairs) / len(pairs)


def sign(one: dict[str, Any]) -> str:
    """Whether the forecast has the sign of a measured effect of more than 2 %.

    An effect is resolved where nine in ten pairs of bursts agree on its sign.
    """
    effect = one["measured_by_throughput"]
    if abs(effect) <= TRUE_EFFECT:
        return "right: no effect of over 2 %"
    if 0.1 < one["faster_pairs"] < 0.9:
        return "not resolved: bursts differ too much"
    return "right" if (effect > 0) == (one["predicted"][0] > 0) else "WRONG"


def main() -> None:
    """Measure, append the rows to a file and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--skews", default="1,1.5,2", help="max/mean rank rows to impose")
    parser.add_argument("--factor", type=float, default=1.0, help="capacity of the levers")
    parser.add_argument("--requests", type=int, default=32, help="in a burst")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt tokens a request")
    parser.add_argument("--pairs", type=int, default=4, help="bursts of each mode, at a skew")
    parser.add_argument("--least-s", type=float, default=16.0, help="in observe, at a skew")
    parser.add_argument("--observe-s", type=float, default=40.0, help="at most")
    parser.add_argument("--settle-s", type=float, default=0.1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    rows = asyncio.run(follow(args))
    result_rows.append(rows, args.out)
    for one in rows:
        gain, low, high = (100.0 * share for share in one["predicted"])
        print(f"skew {one['skew']:g} {one['followed']:10} predicted {gain:5.1f} % "
              f"[{low:.1f}, {high:.1f}], measured {100 * one['measured_by_throughput']:5.1f} % by "
              f"throughput, {100 * one['measured_by_step']:5.1f} % by step, sign "
              f"{sign(one)}")  # fmt: skip
    sys.exit(any(sign(one) == "WRONG" for one in rows))


if __name__ == "__main__":
    main()
