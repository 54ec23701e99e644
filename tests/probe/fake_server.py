"""A stand-in for a server that has the probe: streams chat completions as SGLang 0.5.23 does.

It counts prompt tokens as the probe's tokenizer and processor do, from the text and the pictures
that were sent, and gives the answers it was told, some of them wrong.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image

from benchmarks.probe.suite import Suite, to_request

END_ID = 258


@dataclass(kw_only=True)
class Fake:
    """What the server does. Every `wrong_every`-th known question gets a wrong last character."""

    answers: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    wrong_every: int = 0
    shift: float = 0.0
    die_after: int = 0
    break_at: tuple[int, ...] = ()
    refuse_every: int = 0
    num_extra_tokens: int = 0
    has_logprobs: bool = True
    has_images: bool = True
    num_asked: int = 0
    max_in_flight: int = 0
    _num_in_flight: int = 0

    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`."""
        if self._is_dead():
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`, streamed."""
        body = await request.json()
        place, answer = self.answers.get(json.dumps(body["messages"]), (-1, "x"))
        self.num_asked += place >= 0
        if self._is_dead() or (place >= 0 and self.num_asked in self.break_at):
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        is_refused = self.refuse_every and place >= 0 and (place + 1) % self.refuse_every == 0
        if is_refused or not self.has_images:
            return web.json_response({"object": "error", "message": "refused"}, status=400)
        if self.wrong_every and place >= 0 and place % self.wrong_every == 0:
            answer = answer[:-1] + ("#" if answer[-1] != "#" else "?")
        self._num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._num_in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.002)
        for line in self._stream(num_tokens(body["messages"]) + self.num_extra_tokens, answer):
            await response.write(line.encode())
        self._num_in_flight -= 1
        return response

    def _is_dead(self) -> bool:
        return 0 < self.die_after < self.num_asked

    def _stream(self, num_prompt_tokens: int, answer: str) -> Iterator[str]:
        yield _chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}], None)
        for i, char in enumerate(answer):
            entry = {"token": char, "logprob": -0.01 * ord(char) - self.shift, "top_logprobs": []}
            choice: dict[str, Any] = {"index": 0, "delta": {"content": char}}
            if self.has_logprobs:
                choice["logprobs"] = {"content": [entry]}
            yield _chunk([choice], _usage(num_prompt_tokens, i + 1))
        yield _chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}], None)
        ids = [[*map(ord, answer), END_ID]]
        yield _chunk([], None, sglext={"output_ids": ids})
        yield _chunk([], _usage(num_prompt_tokens, len(answer) + 1))
        yield "data: [DONE]\n\n"


def answers_of(suite: Suite) -> dict[str, tuple[int, str]]:
    """The right answer to each request of `suite`, with its place."""
    found = {}
    for i in range(len(suite)):
        item = suite[i]
        found[json.dumps(list(to_request(item.parts, i).messages))] = (i, item.answer)
    return found


def num_tokens(messages: list[dict[str, Any]]) -> int:
    """Tokens of a prompt: bytes, an image token per 32 by 32 pixels, special tokens."""
    num = len(b"\nassistant\n") + 1
    for message in messages:
        num += 1 + len(f"{message['role']}\n") + 2
        for part in message["content"]:
            if part["type"] == "text":
                num += len(part["text"].encode())
                continue
            data = base64.b64decode(part["image_url"]["url"].split(",")[1])
            width, height = Image.open(io.BytesIO(data)).size
            num += 2 + (width // 32) * (height // 32)
    return num - 1


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """The address of `fake`, served by a thread until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner: web.AppRunner | None = None
    try:
        runner, url = asyncio.run_coroutine_threadsafe(_start(fake), loop).result(10)
        yield url
    finally:
        if runner is not None:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(fake: Fake) -> tuple[web.AppRunner, str]:
    app = web.Application(client_max_size=2**26)
    app.add_routes(
        [web.get("/v1/models", fake.models), web.post("/v1/chat/completions", fake.chat)]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}"


def _usage(num_prompt_tokens: int, num_output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }


def _chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None, **more: Any) -> str:
    tree = {"id": "0", "object": "chat.completion.chunk", "choices": choices, "usage": usage}
    return f"data: {json.dumps(tree | more)}\n\n"
