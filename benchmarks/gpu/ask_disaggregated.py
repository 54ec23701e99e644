"""The same requests to one server and to a disaggregated pair; whether the answers are the same.

    python3 -m benchmarks.gpu.ask_disaggregated --unified http://127.0.0.1:21000 \
        --prefill http://127.0.0.1:22000 --decode http://127.0.0.1:23000 --ranks 2 \
        --skew-file /tmp/skew --out rows.jsonl

The prefill server is asked once for each of `--modes`, the single server twice, the second time for
what it differs from itself by. Three kinds of requests, all greedy:

- `single`: one after the other, of 1 to 2,048 tokens, with the router's own experts;
- `batch`: eight of `--tokens` at once, likewise;
- `skewed`: eight of `--tokens`, with the experts of the load `--skew` (skew_plugin.py). They depend
  on a token's place in its rank's pass, so each rank gets one request at a time.

Both roles get a request with the same room, whose remainder by `--ranks` is the data-parallel rank
that computes it; the single server gets it for the same rank. One JSON row a mode and kind. Ends
with an error where tokens differ from the single server's, where a log-probability is not finite,
or where mode `replicate` copied no expert under skew.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.gpu import result_rows
from benchmarks.gpu.bench_prefill import (
    SINGLE_LENGTHS,
    VOCABULARY,
    client,
    ids,
    last_pass,
    set_mode,
)
from benchmarks.gpu.compare_outputs import compared, log_probabilities

NUM_BATCH = 8
_rooms = count(1)  # a decode server takes room 0 for one not yet written
SMALL = 16  # tokens; passes that carry a new mode in
NEW_TOKENS = 8
AGAIN = "unified again"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: to one server, or to both roles of a pair at once."""

    urls: tuple[str, ...]
    num_ranks: int
    bootstrap_port: int = 0

    async def ask(self, session: aiohttp.ClientSession, prompt: list[int], place: int) -> Any:
        """The answer of the last server to a request for rank `place` modulo the ranks."""
        rank = place % self.num_ranks
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True
            },
            "return_logprob": True,
            "routed_dp_rank": rank,
        }  # fmt: skip
        if self.bootstrap_port:
            body["bootstrap_host"] = "127.0.0.1"
            body["bootstrap_port"] = self.bootstrap_port
            body["bootstrap_room"] = next(_rooms) * self.num_ranks + rank

        async def one(url: str) -> Any:
            async with session.post(f"{url}/generate", json=body) as response:
                if response.status != 200:
                    raise SystemExit(f"{url}: {response.status} {(await response.text())[:500]}")
                return await response.json()

        return (await asyncio.gather(*(one(url) for url in self.urls)))[-1]

    async def ask_all(
        self, session: aiohttp.ClientSession, prompts: list[list[int]], at_once: int
    ) -> list[Any]:
        """The answers to all prompts, so many at a time."""
        answers: list[Any] = []
        for begin in range(0, len(prompts), at_once):
            wave = prompts[begin : begin + at_once]
            answers += await asyncio.gather(
                *(self.ask(session, prompt, place) for place, prompt in enumerate(wave))
            )
        return answers


async def copies(session: aiohttp.ClientSession, url: str) -> int:
    """Experts that a server has copied since its start."""
    async with session.get(f"{url}/moelb/status") as response:
        return int((await response.json())["totals"]["num_copies"])


async def answers_of(
    session: aiohttp.ClientSession, args: argparse.Namespace, target: Target, mode: str
) -> dict[str, dict[str, Any]]:
    """For each kind what was answered, and what the prefill server did meanwhile."""
    vocabulary = args.vocabulary
    rng = random.Random(7)
    single = [ids(rng, length, vocabulary) for length in SINGLE_LENGTHS if length <= args.tokens]
    batch = [ids(rng, args.tokens, vocabulary) for _ in range(NUM_BATCH)]
    small = [ids(rng, SMALL, vocabulary) for _ in range(2 * args.ranks)]
    is_pair = bool(target.bootstrap_port)
    if is_pair:
        await set_mode(session, args.prefill, mode)
    plans = {"single": ("0", single, 1), "batch": ("0", batch, NUM_BATCH),
             "skewed": (args.skew, batch, args.ranks)}  # fmt: skip
    found = {}
    for kind, (load, prompts, at_once) in plans.items():
        Path(args.skew_file).write_text(f"{load} | {mode}")
        for _ in range(2):  # a change of mode is published after the record of a pass
            await target.ask_all(session, small, len(small))
        before = await copies(session, args.prefill) if is_pair else 0
        begun = time.perf_counter()
        answers = await target.ask_all(session, prompts, at_once)
        print(f"asked {kind} of {mode}: {time.perf_counter() - begun:.1f} s", flush=True)
        found[kind] = {
            "load": load,
            "said": [log_probabilities([answer]) for answer in answers],
            "copies": await copies(session, args.prefill) - before if is_pair else 0,
            "pass": await last_pass(session, args.prefill, mode if is_pair else "stock"),
        }
    return found


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each mode and kind, appended to the file and printed as they come."""
    single = Target((args.unified,), args.ranks)
    pair = Target((args.prefill, args.decode), args.ranks, args.bootstrap_port)
    rows: list[dict[str, Any]] = []
    async with client() as session:
        first = await answers_of(session, args, single, "stock")
        for mode in (*args.modes.split(","), AGAIN):
            other = await answers_of(session, args, single if mode == AGAIN else pair, mode)
            added = [
                {
                    "hardware": args.hardware,
                    "commit": args.commit,
                    "backend": "" if mode == AGAIN else args.backend,
                    "mode": mode,
                    "kind": kind,
                    "load": one["load"],
                    **compared(first[kind]["said"], one["said"]),
                    "copies": one["copies"],
                    "pass": one["pass"],
                }
                for kind, one in other.items()
            ]
            result_rows.append(added, args.out)
            print_rows(added)
            rows += added
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each."""
    for row in rows:
        print(f"{row['mode']:14} {row['kind']:7} {row['requests_equal']} of {row['requests']} "
              f"requests and {row['tokens_equal']} of {row['tokens']} tokens equal, "
              f"log-probabilities at most {row['apart_max']:.5f} apart, mean "
              f"{row['apart_mean']:.6f}, {row['copies']} experts copied", flush=True)  # fmt: skip


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be; nothing where all is well."""
    found = []
    for row in rows:
        name = f"{row['mode']}, {row['kind']}"
        if not row["finite"]:
            found.append(f"{name}: a log-probability is not finite")
        if row["tokens_equal"] != row["tokens"]:
            found.append(f"{name}: tokens differ from the single server's")
        if row["mode"].startswith("replicate") and row["kind"] == "skewed" and not row["copies"]:
            found.append(f"{name}: no expert was copied")
    return found


def main() -> None:
    """Ask, keep the rows, and end with what must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for role in ("unified", "prefill", "decode"):
        parser.add_argument(f"--{role}", required=True, help="address of a running server")
    parser.add_argument("--bootstrap-port", type=int, default=8998)
    parser.add_argument("--ranks", type=int, required=True, help="of each server")
    parser.add_argument("--modes", default="none,replicate", help="of the prefill server")
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--skew", default="2 experts=16", help="load of the kind skewed")
    parser.add_argument("--tokens", type=int, default=2048, help="of a long prompt")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="ids of prompts")
    parser.add_argument("--backend", default="", help="kept in the rows")
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    if found := faults(rows):
        raise SystemExit("\n".join(found))
    print("all as it should be")


if __name__ == "__main__":
    main()
