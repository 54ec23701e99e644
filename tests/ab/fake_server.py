"""A stand-in for an SGLang server: streams chat completions as SGLang 0.5.23 does, and a status.

`python fake_server.py --port N [--plugin] [--shift X] [--flip-every N] [--die-after N]
[--one-a-connection]`. Answers are a function of the prompt, so two servers agree; `--shift` moves
every log-probability, and `--flip-every N` changes the last token of every Nth prompt.
`--die-after` ends the process in the middle of that request, `--one-a-connection` refuses a second
request on a connection. With `--plugin` it serves `GET /moelb/status`, one pass per request.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

NUM_LAYERS = 4
PROMPT_TOKENS = 10
BALANCE_BEFORE = (1.5, 1.4, 1.3, 1.2)
BALANCE_AFTER = (1.25, 1.2, 1.2, 1.1)
ROWS_BEFORE = (600.0, 400.0)
ROWS_AFTER = (560.0, 440.0)
LOST_MASS = 0.5
ROUTED_MASS = 100.0
RECENT = 64


class Fake:
    """The state of one server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.num_requests = 0
        self.clients: set[Any] = set()
        self.passes: list[dict[str, Any]] = []

    def note_pass(self) -> None:
        """One prefill pass with drop for every three of four requests, and a decode pass."""
        step = len(self.passes)
        dropped = step % 8 != 6
        self.passes.append(_pass(step, "prefill", dropped))
        self.passes.append(_pass(step + 1, "decode", dropped=False))

    def status(self) -> dict[str, Any]:
        """The JSON of `GET /moelb/status`."""
        used = [p for p in self.passes if p["phase"] == "prefill" and not p["gate_reason"]]
        prefill = [p for p in self.passes if p["phase"] == "prefill"]
        return {
            "active": True,
            "form": "hook",
            "mode": "auto",
            "config": {"mode": "auto", "controller": {"quality_budget": 0.02}},
            "topology": {"num_layers": NUM_LAYERS, "num_experts": 16, "num_ranks": 2, "topk": 4},
            "policy": {"epoch": 2, "lever": "drop", "reason": "gain 0.05"},
            "controller": {
                "state": "running",
                "num_passes": len(self.passes),
                "last_decision": {"lever": "drop", "reason": "gain", "expected_gain": 0.05},
            },
            "totals": {
                "num_passes": len(self.passes),
                "num_prefill_passes": len(prefill),
                "num_passes_by_lever": {"none": len(self.passes) - len(used), "drop": len(used)},
                "routed_mass": ROUTED_MASS * len(self.passes),
                "lost_mass": LOST_MASS * len(used),
                "moved_mass": 0.0,
                "num_dropped_rows": 10 * len(used),
                "num_added_rows": 0,
            },
            "recent": self.passes[-RECENT:],
        }


def _pass(step: int, phase: str, dropped: bool) -> dict[str, Any]:
    gate = "" if dropped else ("decode" if phase == "decode" else f"{step} tokens are too few")
    return {
        "step": step,
        "phase": phase,
        "lever": "none" if gate else "drop",
        "policy_lever": "drop",
        "epoch": 1 + step // 40,
        "reason": f"gain 0.0{5 + step % 3}",
        "gate_reason": gate,
        "num_tokens_R": [60, 40],
        "num_vision_tokens_R": [30, 20],
        "balance_before_L": list(BALANCE_BEFORE),
        "balance_after_L": list(BALANCE_AFTER if dropped else BALANCE_BEFORE),
        "rows_before_R": list(ROWS_BEFORE),
        "rows_after_R": list(ROWS_AFTER if dropped else ROWS_BEFORE),
        "lost_share": LOST_MASS / ROUTED_MASS if dropped else 0.0,
        "moved_share": 0.0,
        "step_ms": 30.0,
        "experts_ms": 9.0,
        "balance_ms": 0.6,
    }


def answer_of(body: dict[str, Any], options: argparse.Namespace) -> list[tuple[int, str, float]]:
    """Tokens of the answer: id, text, log-probability. Every fourth has no text of its own."""
    digest = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).digest()
    ids = [digest[i % len(digest)] for i in range(body["max_tokens"])]
    if options.flip_every and digest[0] % options.flip_every == 0:
        ids[-1] = (ids[-1] + 1) % 256
    return [
        (token, "" if i % 4 == 3 else chr(97 + token % 26), -token / 256 - options.shift)
        for i, token in enumerate(ids)
    ]


def make_app(fake: Fake) -> FastAPI:
    """The routes of the server."""
    app = FastAPI()

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=200)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "fake", "object": "model"}]}

    @app.get("/moelb/status")
    def status() -> dict[str, Any]:
        if not fake.options.plugin:
            raise HTTPException(status_code=404)
        return fake.status()

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body = await request.json()
        if fake.options.one_a_connection and request.client in fake.clients:
            return JSONResponse({"object": "error", "message": "used twice"}, status_code=400)
        fake.clients.add(request.client)
        if "REFUSE" in json.dumps(body["messages"]):
            return JSONResponse({"object": "error", "message": "refused"}, status_code=400)
        fake.num_requests += 1
        fake.note_pass()
        return StreamingResponse(_stream(fake, body), media_type="text/event-stream")

    return app


async def _stream(fake: Fake, body: dict[str, Any]) -> AsyncIterator[str]:
    tokens = answer_of(body, fake.options)
    yield _chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}], None)
    for i, (_, text, logprob) in enumerate(tokens):
        await asyncio.sleep(fake.options.token_s)
        if fake.options.die_after and fake.num_requests >= fake.options.die_after:
            os._exit(7)
        if not text and not fake.options.tool_call_parser:
            continue
        entry = {"token": text, "bytes": [], "logprob": logprob, "top_logprobs": []}
        choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [entry]}}
        yield _chunk([choice], _usage(i + 1))
    yield _chunk([{"index": 0, "delta": {}, "finish_reason": "length"}], None)
    ids = [[token for token, _, _ in tokens]]
    yield _chunk([], None, sglext={"output_ids": ids})
    yield _chunk([], _usage(len(tokens)))
    yield "data: [DONE]\n\n"


def _usage(num_output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": num_output_tokens,
        "total_tokens": PROMPT_TOKENS + num_output_tokens,
    }


def _chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None, **more: Any) -> str:
    tree = {"id": "0", "object": "chat.completion.chunk", "choices": choices, "usage": usage}
    return f"data: {json.dumps(tree | more)}\n\n"


def main() -> None:
    """Parse what a server of SGLang gets, as far as we use it, and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--tool-call-parser", default="")
    parser.add_argument("--shift", type=float, default=0.0)
    parser.add_argument("--flip-every", type=int, default=0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--die-at-start", action="store_true")
    parser.add_argument("--one-a-connection", action="store_true")
    parser.add_argument("--token-s", type=float, default=0.001)
    options, _ = parser.parse_known_args()
    if options.die_at_start:
        sys.exit("a flag that this server does not know: --die-at-start")
    uvicorn.run(make_app(Fake(options)), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
