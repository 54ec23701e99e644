"""Prefill throughput of running servers at several skews and modes, interleaved.

    python3 -m benchmarks.gpu.bench_prefill --server stock=http://127.0.0.1:21000=stock \
        --server moelb=http://127.0.0.1:22000=none,drop@1.25 \
        --skew-file /tmp/skew --skews "1,2,2 moving" --out rows.jsonl

A skew is a load as in `skew_plugin`. Each request is `--tokens` random ids with one token out; a
burst of `--requests` goes to one server. For every repeat, all (skew, server, mode) are measured
once, in an order that is reversed every second repeat. One JSON row a burst. With `--outputs`,
tokens and log-probabilities of all are compared first with those of the first.

Mode `eplb` is SGLang's own EPLB: before a measured burst it serves the load until it has rebalanced
twice, as its log in the folder `--logs` says; `eplb@2 opposite` learns that load instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.gpu import result_rows
from benchmarks.gpu.compare_outputs import log_probabilities, print_outputs
from benchmarks.gpu.skew_plugin import Load

VOCABULARY = 150_000
SINGLE_LENGTHS = (1, 7, 64, 333, 1024, 2048)
NUM_REBALANCES = 2  # the first may be of a window that holds another load
MAX_LEARNING = 40  # bursts
QUOTA_LEARNING = 6  # bursts, until shares of copies have been planned and sent
REBALANCED = re.compile(r" TP0\b.*rebalance end time=([0-9.]+)s")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the modes to measure it in."""

    label: str
    url: str
    modes: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Server:
        """Read LABEL=URL=MODE,MODE."""
        label, url, modes = text.split("=", 2)
        return cls(label, url, tuple(modes.split(",")))


def turns(servers: list[Server]) -> Iterator[tuple[Server, str]]:
    """Every mode of every server."""
    return ((server, mode) for server in servers for mode in server.modes)


def ids(rng: random.Random, num_tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    """A prompt of random tokens."""
    return [rng.randrange(vocabulary) for _ in range(num_tokens)]


def client() -> aiohttp.ClientSession:
    """Connections are not kept: a server closes those that other servers' turns leave idle."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=300), connector=aiohttp.TCPConnector(force_close=True)
    )


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


def is_stock(mode: str) -> bool:
    """Whether a mode is SGLang's own, so that the server has no status and cannot be switched."""
    return mode.partition("@")[0] in ("stock", "eplb")


async def set_mode(session: aiohttp.ClientSession, url: str, mode: str) -> None:
    """Switch a balanced server; one without the plugin is left alone."""
    if is_stock(mode):
        return
    name, _, factor = mode.partition("@")
    name, _, form = name.partition(":")
    change: dict[str, Any] = {"mode": name, "controller": {"quality_budget": 1.0}}
    if factor:
        section = "downgrade" if name == "downgrade" else "capacity"
        change[section] = {"factor": float(factor)}
    if name == "downgrade":
        change["downgrade"] = {**change.get("downgrade", {}), "form": form or "rank"}
    elif form:
        change["resident"] = {"split": form}
    async with session.post(f"{url}/moelb/config", json=change) as response:
        if response.status != 200:
            raise SystemExit(f"{url}/moelb/config: {response.status} {await response.text()}")


async def settle(session: aiohttp.ClientSession, url: str, mode: str) -> None:
    """Switch, and carry the new policy in: it is published after the record of a small pass."""
    await set_mode(session, url, mode)
    for _ in range(2):
        await burst(session, url, [[1, 2, 3]] * 4, 1)


async def last_pass(session: aiohttp.ClientSession, url: str, mode: str) -> dict[str, Any]:
    """The largest of the last prefill passes, from the status of a balanced server."""
    if is_stock(mode):
        return {}
    async with session.get(f"{url}/moelb/status") as response:
        status = await response.json()
    prefills = [row for row in status["recent"] if row["phase"] == "prefill"][-4:]
    largest = max(prefills, key=lambda row: sum(row["num_tokens_R"]), default={})
    decided = status["controller"].get("last_decision") or {}
    return {**largest, "resident": decided.get("resident", "")}


def rebalances(args: argparse.Namespace, label: str) -> list[float]:
    """Seconds that serving stood still for each rebalance of a server so far."""
    log = Path(args.logs) / f"server-{label}.log"
    return [float(took_s) for took_s in REBALANCED.findall(log.read_text(errors="replace"))]


def prompts_of(args: argparse.Namespace, seed: int) -> list[list[int]]:
    """The prompts of one burst."""
    rng = random.Random(seed)
    return [ids(rng, args.tokens, args.vocabulary) for _ in range(args.requests)]


async def learn(
    session: aiohttp.ClientSession, args: argparse.Namespace, server: Server, load: str
) -> dict[str, Any]:
    """Serve a load until EPLB has rebalanced on it; what that took."""
    Path(args.skew_file).write_text(f"{load} | learning")
    before = len(rebalances(args, server.label))
    for number in range(MAX_LEARNING):
        await burst(session, server.url, prompts_of(args, number), 1)
        took_s = rebalances(args, server.label)[before:]
        if len(took_s) >= NUM_REBALANCES:
            return {"learnt": load, "learning_bursts": number + 1, "rebalances_s": took_s}
    raise SystemExit(f"{server.label}: {MAX_LEARNING} bursts without {NUM_REBALANCES} rebalances; "
                     "set --eplb-rebalance-num-iterations lower")  # fmt: skip


async def prepare(
    session: aiohttp.ClientSession, args: argparse.Namespace, server: Server, mode: str, load: str
) -> dict[str, Any]:
    """Bring a server into a mode and let it learn the load; what an EPLB server has learnt."""
    name, _, other = mode.partition("@")
    if name == "eplb":
        return await learn(session, args, server, other or load)
    await settle(session, server.url, mode)
    if name.endswith(":quota"):
        Path(args.skew_file).write_text(f"{load} | learning")
        for number in range(QUOTA_LEARNING):
            await burst(session, server.url, prompts_of(args, number), 1)
    return {}


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All repeats of all skews, servers and modes."""
    rows: list[dict[str, Any]] = []
    order = [(skew, *turn) for skew in args.skews.split(",") for turn in turns(args.server)]
    async with client() as session:
        for repeat in range(-args.warmups, args.repeats):
            for load, server, mode in order if repeat % 2 == 0 else order[::-1]:
                if repeat < 0:
                    Path(args.skew_file).write_text(f"{load} | warm-up")
                    await settle(session, server.url, mode)
                    await burst(session, server.url, prompts_of(args, repeat), 1)
                    continue
                learnt = await prepare(session, args, server, mode, load)
                before = len(rebalances(args, server.label)) if learnt else 0
                Path(args.skew_file).write_text(f"{load} | {mode}")
                seconds, _ = await burst(session, server.url, prompts_of(args, repeat), 1)
                if learnt:
                    learnt["rebalances_in_burst_s"] = rebalances(args, server.label)[before:]
                rows.append({
                    "hardware": args.hardware,
                    "commit": args.commit,
                    "label": server.label,
                    "skew": Load.parse(load).skew,
                    "load": load,
                    "mode": mode,
                    "repeat": repeat,
                    "requests": args.requests,
                    "tokens": args.tokens,
                    "seconds": seconds,
                    "tokens_per_s": args.requests * args.tokens / seconds,
                    "pass": await last_pass(session, server.url, mode),
                    **learnt,
                })  # fmt: skip
    return rows


async def outputs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What every server and mode answers: to single requests as routed, to a batch at top skew."""
    said: dict[str, dict[str, Any]] = {}
    async with client() as session:
        for server, mode in turns(args.server):
            rng = random.Random(7)
            Path(args.skew_file).write_text("0")
            await settle(session, server.url, mode)
            single = []
            for length in SINGLE_LENGTHS:
                single += (await burst(session, server.url, [ids(rng, length)], 8))[1]
            Path(args.skew_file).write_text(
                max(args.skews.split(","), key=lambda load: Load.parse(load).skew)
            )
            prompts = [ids(rng, args.tokens) for _ in range(args.batch)]
            _, batch = await burst(session, server.url, prompts, 4)
            said[f"{server.label} {mode}"] = {
                "single": log_probabilities(single),
                "batch": log_probabilities(batch),
                "pass": await last_pass(session, server.url, mode),
            }
    return said


def main() -> None:
    """Compare, measure, append the rows to a file and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--server", action="append", type=Server.parse, required=True,
        help="LABEL=URL=MODES; modes: stock, or such as drop@1.25,downgrade:experts@1.0; "
        "with resident copies none:even,none:quota",
    )  # fmt: skip
    parser.add_argument("--skew-file", required=True)
    parser.add_argument("--skews", default="1,2,3", help="loads to impose, such as 2,2 moving")
    parser.add_argument("--logs", default=".", help="folder of server-LABEL.log, for mode eplb")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="prompt tokens a request")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="ids of prompts")
    parser.add_argument("--batch", type=int, default=8, help="requests compared at top skew")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--outputs", default="", help="file for the outputs compared")
    result_rows.add_arguments(parser)
    args = parser.parse_args()
    if args.outputs:
        said = asyncio.run(outputs(args))
        Path(args.outputs).write_text(json.dumps(said))
        print_outputs(said)
    rows = asyncio.run(measure(args))
    result_rows.append(rows, args.out)
    for key in dict.fromkeys((r["load"], r["label"], r["mode"]) for r in rows):
        own = [r for r in rows if (r["load"], r["label"], r["mode"]) == key]
        rates = [r["tokens_per_s"] for r in own]
        print(f"skew {key[0]:14} {key[1]:10} {key[2]:14} median {statistics.median(rates):9.0f} "
              f"min {min(rates):9.0f} max {max(rates):9.0f} tok/s")  # fmt: skip
        pauses = [pause for r in own for pause in r.get("rebalances_s", ())]
        if pauses:
            within = sum(len(r["rebalances_in_burst_s"]) for r in own)
            print(f"  EPLB rebalanced {len(pauses)} times before these bursts and {within} times "
                  f"within, pauses {min(pauses):.3f} to {max(pauses):.3f} s")  # fmt: skip


if __name__ == "__main__":
    main()
