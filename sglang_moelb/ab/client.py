"""One chat request over HTTP, streamed, as an `Outcome`; and a round of them.

Written against the chunks of SGLang 0.5.23 (`entrypoints/openai/serving_chat.py`): a first chunk
with the role when the first token is there, then chunks with text, their log-probabilities and a
running usage, a chunk with the finish reason, one with the exact output ids (`sglext`), a usage
chunk without choices, and `[DONE]`. Other OpenAI servers ignore what they do not know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from sglang_moelb.ab.types import Outcome, Request

_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where and how requests are sent."""

    url: str
    model: str
    max_tokens: int
    timeout_s: float


class _RequestError(RuntimeError):
    """The server answered with an error; the message is its reason."""


@dataclass(slots=True)
class _Stream:
    """What the chunks have said so far."""

    first_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    text: str = ""
    entries: dict[int, tuple[str, float]] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any], now_s: float) -> None:
        """Read one chunk that came at `now_s`. Raises `_RequestError`."""
        if "error" in chunk:
            raise _RequestError(error_text(chunk))
        usage = chunk.get("usage") or {}
        self.num_prompt_tokens = usage.get("prompt_tokens", self.num_prompt_tokens)
        self.num_output_tokens = usage.get("completion_tokens", self.num_output_tokens)
        ids = (chunk.get("sglext") or {}).get("output_ids")
        if ids:
            self.token_ids = tuple(ids[0])
        for choice in chunk.get("choices", ()):
            self.first_s = self.first_s or now_s
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.text += (choice.get("delta") or {}).get("content") or ""
            content = (choice.get("logprobs") or {}).get("content") or ()
            # The running usage says where these tokens stand, also after tokens without text.
            end = usage.get("completion_tokens") or len(self.entries) + len(content)
            for i, entry in enumerate(content, end - len(content)):
                self.entries[i] = (entry["token"], entry["logprob"])

    def to_outcome(self, request: Request, round_: int, start_s: float, end_s: float) -> Outcome:
        """The finished stream. Tokens that carried no log-probability get None."""
        length = max(len(self.token_ids), self.num_output_tokens, max(self.entries, default=-1) + 1)
        return Outcome(
            request_id=request.request_id,
            kind=request.kind,
            round=round_,
            start_s=start_s,
            ttft_ms=((self.first_s or end_s) - start_s) * 1e3,
            latency_ms=(end_s - start_s) * 1e3,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=length,
            token_ids=self.token_ids,
            token_texts=tuple(
                self.entries[i][0] if i in self.entries else None for i in range(length)
            ),
            logprobs=tuple(
                self.entries[i][1] if i in self.entries else None for i in range(length)
            ),
            finish_reason=self.finish_reason,
            text=self.text,
        )


async def send(
    http: aiohttp.ClientSession, target: Target, request: Request, round_: int
) -> Outcome:
    """Send `request` and read its stream to the end; a failure is an outcome with `error`."""
    start_s = time.monotonic()
    stream = _Stream()
    try:
        async with asyncio.timeout(target.timeout_s):
            async for chunk in _chunks(http, target, request):
                stream.take(chunk, time.monotonic())
    except TimeoutError:
        error = f"no end after {target.timeout_s:.0f} s"
    except (aiohttp.ClientError, ConnectionError) as failure:
        error = f"connection: {type(failure).__name__}: {failure}"
    except (_RequestError, msgspec.DecodeError) as failure:
        error = str(failure)
    else:
        error = "" if stream.finish_reason else "the stream ended without a finish reason"
    if error:
        return failed(request, round_, start_s, error)
    return stream.to_outcome(request, round_, start_s, time.monotonic())


def failed(request: Request, round_: int, start_s: float, error: str) -> Outcome:
    """The outcome of a request that failed for the reason `error`."""
    return Outcome(
        request_id=request.request_id,
        kind=request.kind,
        round=round_,
        start_s=start_s,
        error=error[:_MAX_ERROR_CHARS],
    )


async def send_all(
    http: aiohttp.ClientSession,
    target: Target,
    requests: Sequence[Request],
    *,
    round_: int,
    concurrency: int,
    on_done: Callable[[Outcome], None],
) -> None:
    """Send `requests` in order, `concurrency` in flight: a new one starts when one ends."""
    waiting = iter(requests)

    async def work() -> None:
        for request in waiting:
            on_done(await send(http, target, request, round_))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(work())


def error_text(tree: dict[str, Any]) -> str:
    """The reason in an error body of SGLang (`message`) or OpenAI (`error.message`)."""
    inner = tree.get("error", tree)
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


async def _chunks(
    http: aiohttp.ClientSession, target: Target, request: Request
) -> AsyncIterator[dict[str, Any]]:
    async with http.post(
        f"{target.url}/v1/chat/completions", json=_body(target, request)
    ) as answer:
        if answer.status != 200:
            raise _RequestError(f"HTTP {answer.status}: {_reason(await answer.text())}")
        async for line in answer.content:
            text = line.decode().strip()
            if text.startswith("data:") and (data := text[5:].strip()) != "[DONE]":
                yield msgspec.json.decode(data)


def _body(target: Target, request: Request) -> dict[str, Any]:
    return {
        "model": target.model,
        "messages": request.messages,
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_output_ids_in_sglext": True,
    }


def _reason(text: str) -> str:
    try:
        tree = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return error_text(tree) if isinstance(tree, dict) else text
