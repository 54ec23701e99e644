"""Prefill throughput of a running server at several skews and modes, interleaved.

    python3 -m benchmarks.gpu.bench_prefill --url http://127.0.0.1:31000 --label stock \
        --skew-file /tmp/skew --skews 1,2,3 --modes stock --out rows.jsonl

Each request is `--tokens` random ids with one token out; a burst holds `--requests` of them. For
every repeat, all (skew, mode) pairs are measured once, in an order that is reversed every second
repeat. One JSON row a burst; the table shows median, minimum and maximum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp

VOCABULARY = 150_000


async def burst(
    session: aiohttp.ClientSession, url: str, prompts: list[list[int]], new_tokens: int
) -> tuple[float, list[Any]]:
    """Send all prompts at once; seconds until the last answer, and the answers."""

    async def one(ids: list[int]) -> Any:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": new_tokens > 1}
        async with session.post(f"{url}/generate", json=body) as response:
            response.raise_for_status()
            return await response.json()

    begun = time.perf_counter()
    answers = await asyncio.gather(*(one(ids) for ids in prompts))
    return time.perf_counter() - begun, answers


async def set_mode(session: aiohttp.ClientSession, url: str, mode: str) -> None:
    """Switch a balanced server; `stock` is a server without the plugin and is left alone."""
    if mode == "stock":
        return
    name, _, factor = mode.partition("@")
    name, _, form = name.partition(":")
    change: dict[str, Any] = {"mode": name, "controller": {"quality_budget": 1.0}}
    if factor:
        section = "downgrade" if name == "downgrade" else "capacity"
        change[section] = {"factor": float(factor)}
    if name == "downgrade":
        change["downgrade"] = {**change.get("downgrade", {}), "form": form or "rank"}
    async with session.post(f"{url}/moelb/config", json=change) as response:
        if response.status != 200:
            raise SystemExit(f"{url}/moelb/config: {response.status} {await response.text()}")


async def settle(session: aiohttp.ClientSession, url: str, mode: str) -> None:
    """Switch, and carry the new policy in: it is published after the record of a small pass."""
    await set_mode(session, url, mode)
    for _ in range(2):
        await burst(session, url, [[1, 2, 3]] * 4, 1)


async def last_pass(
    session: aiohttp.ClientSession, url: str, mode: str, num_last: int = 4
) -> dict[str, Any]:
    """The largest of the last prefill passes, from the status of a balanced server."""
    if mode == "stock":
        return {}
    async with session.get(f"{url}/moelb/status") as response:
        recent = (await response.json())["recent"]
    prefills = [row for row in recent if row["phase"] == "prefill"]
    return max(prefills[-num_last:], key=lambda row: sum(row["num_tokens_R"])) if prefills else {}


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All repeats of all pairs."""
    rows: list[dict[str, Any]] = []
    pairs = [(s, m) for s in args.skews.split(",") for m in args.modes.split(",")]
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for repeat in range(-args.warmups, args.repeats):
            for skew, mode in pairs if repeat % 2 == 0 else pairs[::-1]:
                Path(args.skew_file).write_text(skew)
                await settle(session, args.url, mode)
                rng = random.Random(repeat)
                prompts = [
                    [rng.randrange(VOCABULARY) for _ in range(args.tokens)]
                    for _ in range(args.requests)
                ]
                seconds, _ = await burst(session, args.url, prompts, 1)
                row = {
                    "hardware": args.hardware,
                    "commit": args.commit,
                    "label": args.label,
                    "skew": float(skew),
                    "mode": mode,
                    "repeat": repeat,
                    "requests": args.requests,
                    "tokens": args.tokens,
                    "seconds": seconds,
                    "tokens_per_s": args.requests * args.tokens / seconds,
                    "pass": await last_pass(session, args.url, mode),
                }
                if repeat >= 0:
                    rows.append(row)
    return rows


async def identity(args: argparse.Namespace) -> list[Any]:
    """Tokens and log-probabilities of single requests, to compare servers bit by bit."""
    rng = random.Random(7)
    async with aiohttp.ClientSession() as session:
        await settle(session, args.url, args.modes.split(",")[0])
        outputs = []
        for length in (1, 7, 64, 333, 1024, 2048):
            _, answers = await burst(
                session, args.url, [[rng.randrange(VOCABULARY) for _ in range(length)]], 8
            )
            meta = answers[0]["meta_info"]["output_token_logprobs"]
            outputs.append([(entry[0], entry[1]) for entry in meta])
        return outputs


async def closeness(args: argparse.Namespace) -> None:
    """Print how far log-probabilities of each mode are from those of the first, at the top skew.

    Ends the process where one is not finite, or where the rule should have lowered a rank and none
    was.
    """
    Path(args.skew_file).write_text(max(args.skews.split(","), key=float))
    rng = random.Random(11)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(args.tokens)] for _ in range(4)]
    said: dict[str, list[tuple[float, int]]] = {}
    async with aiohttp.ClientSession() as session:
        for mode in args.modes.split(","):
            await settle(session, args.url, mode)
            _, answers = await burst(session, args.url, prompts, 4)
            said[mode] = [
                (entry[0], entry[1])
                for answer in answers
                for entry in answer["meta_info"]["output_token_logprobs"]
            ]
            low_rows = (await last_pass(session, args.url, mode, 2)).get("low_rows_R", [])
            print(f"{args.label} {mode}: rows at low precision by rank {low_rows}")
            if mode.startswith("downgrade") and not sum(low_rows):
                raise SystemExit(f"{mode}: no rank was lowered")
    first = said[args.modes.split(",")[0]]
    for mode, pairs in said.items():
        apart = [abs(a[0] - b[0]) for a, b in zip(first, pairs, strict=True)]
        same = sum(a[1] == b[1] for a, b in zip(first, pairs, strict=True))
        print(f"{args.label} {mode}: log-probabilities apart by {statistics.mean(apart):.5f}, at "
              f"most {max(apart):.5f}; {same} of {len(pairs)} tokens equal")  # fmt: skip
        if not all(math.isfinite(logprob) for logprob, _ in pairs):
            raise SystemExit(f"{mode}: a log-probability is not finite")


def main() -> None:
    """Measure, append the rows to a file and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--label", required=True, help="name of the server in the rows")
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--skews", default="1,2,3", help="max/mean rank rows to impose")
    parser.add_argument(
        "--modes", default="stock", help="stock, or such as drop@1.25, downgrade:experts@1.0"
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="prompt tokens a request")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--hardware", default="", help="kept in the rows")
    parser.add_argument("--commit", default="", help="of sglang_moelb, kept in the rows")
    parser.add_argument("--identity", default="", help="file for single-request outputs")
    parser.add_argument("--closeness", action="store_true", help="compare the modes' outputs")
    parser.add_argument("--out", required=True, help="JSON lines, appended")
    args = parser.parse_args()
    if args.identity:
        Path(args.skew_file).write_text("0")
        outputs = asyncio.run(identity(args))
        Path(args.identity).write_text(json.dumps(outputs))
    if args.closeness:
        asyncio.run(closeness(args))
    rows = asyncio.run(measure(args))
    with Path(args.out).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for key in dict.fromkeys((r["skew"], r["mode"]) for r in rows):
        rates = [r["tokens_per_s"] for r in rows if (r["skew"], r["mode"]) == key]
        print(f"{args.label:8} skew {key[0]} {key[1]:12} median {statistics.median(rates):9.0f} "
              f"min {min(rates):9.0f} max {max(rates):9.0f} tok/s")  # fmt: skip


if __name__ == "__main__":
    main()
