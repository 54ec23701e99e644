"""Decode throughput of running servers, interleaved, and whether they say the same.

    python3 -m benchmarks.gpu.bench_decode --server stock=http://127.0.0.1:21000=stock \
        --server resident=http://127.0.0.1:22000=stock --out rows.jsonl

A burst is `--requests` prompts of `--tokens` random ids with `--new` tokens out each, greedy; for
every repeat all servers are measured once, in an order that is reversed every second repeat, with
the same prompts. A burst of one token out each, before it, is what prefill takes: the table has as
time of a step what is left over the rest of the tokens. One JSON row a burst. Tokens are compared
with the first server's of the same repeat, and its own with those of the burst sent to it again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

import aiohttp

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_prefill import Server, client, ids

Tokens = list[list[int]]


async def burst(
    session: aiohttp.ClientSession, url: str, prompts: Tokens, new_tokens: int
) -> tuple[float, Tokens]:
    """Send all prompts at once; seconds until the last answer, and the tokens of each."""

    async def one(prompt: list[int]) -> list[int]:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        async with session.post(f"{url}/generate", json=body) as response:
            response.raise_for_status()
            said: list[int] = (await response.json())["output_ids"]
            return said

    begun = time.perf_counter()
    said = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - begun, list(said)


def same(first: Tokens, other: Tokens) -> dict[str, float]:
    """Of all answers: equal ones, and the mean share of tokens before the first that differs."""
    pairs = list(zip(first, other, strict=True))
    shares = []
    for a, b in pairs:
        apart = [at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        shares.append((apart[0] if apart else len(a)) / len(a))
    return {
        "equal": sum(a == b for a, b in pairs) / len(pairs),
        "prefix": statistics.mean(shares),
    }


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All repeats of all servers."""
    rows: list[dict[str, Any]] = []
    async with client() as session:
        for repeat in range(-args.warmups, args.repeats):
            rng = random.Random(repeat)
            prompts = [ids(rng, args.tokens) for _ in range(args.requests)]
            said: dict[str, Tokens] = {}
            for server in args.server if repeat % 2 == 0 else args.server[::-1]:
                prefill_s, _ = await burst(session, server.url, prompts, 1)
                seconds, said[server.label] = await burst(
                    session, server.url, prompts, args.new
                )
                rows.append({
                    "hardware": args.hardware,
                    "commit": args.commit,
                    "label": server.label,
                    "repeat": repeat,
                    "requests": args.requests,
                    "tokens": args.tokens,
                    "new_tokens": args.new,
                    "seconds": seconds,
                    "prefill_s": prefill_s,
                    "tokens_per_s": args.requests * args.new / seconds,
                })  # fmt: skip
            first = args.server[0]
            _, again = await burst(session, first.url, prompts, args.new)
            for row in rows[-len(args.server) :]:
                row |= same(said[first.label], said[row["label"]])
                if row["label"] == first.label:
                    row |= same(said[first.label], again)
    return [row for row in rows if row["repeat"] >= 0]


def show(rows: list[dict[str, Any]]) -> None:
    """Median, least and most of each server."""
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        rates = [row["tokens_per_s"] for row in mine]
        # Of all prefills the fastest: in others kernels are compiled for new sizes of batches.
        decode_s = statistics.median(row["seconds"] for row in mine) - min(
            row["prefill_s"] for row in mine
        )
        told = (
            f"tok/s out median {statistics.median(rates):9.2f} min {min(rates):9.2f} "
            f"max {max(rates):9.2f}, {1000 * decode_s / (mine[0]['new_tokens'] - 1):.2f} ms a step"
        )
        equal, prefix = (statistics.mean(row[key] for row in mine) for key in ("equal", "prefix"))
        print(f"{label:10} {told}; answers equal {equal:.3f}, "
              f"tokens before the first other one {prefix:.3f}")  # fmt: skip


def main() -> None:
    """Measure, append the rows to a file and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", action="append", type=Server.parse, required=True,
                        help="LABEL=URL=stock")  # fmt: skip
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="prompt tokens a request")
    parser.add_argument("--new", type=int, default=128, help="tokens out of a request")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--warmups", type=int, default=2)
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    result_rows.append(rows, args.out)
    show(rows)


if __name__ == "__main__":
    main()
