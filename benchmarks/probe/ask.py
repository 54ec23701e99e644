"""Ask a running server the items of a suite. The only part of the evaluation that does HTTP."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
import numpy as np

from benchmarks.probe.item import num_prompt_tokens
from benchmarks.probe.result import Graded, grade
from benchmarks.probe.suite import ProbeError, Requests, Suite, to_request
from sglang_moelb.ab.client import Target, send, send_all
from sglang_moelb.ab.types import Outcome

MAX_TOKENS = 20  # the longest answers have 15 characters
MAX_FAILURES = 10
_MAX_ATTEMPTS = 3
_CONNECTION = "connection:"  # how sglang_moelb.ab.client begins an error of the transport
_PREFLIGHT_TIMEOUT_S = 15.0

# Counted otherwise by a tokenizer that is not one of bytes, or a processor that resizes.
_PREFLIGHT_PARTS = (
    np.zeros((128, 160, 3), np.uint8),
    np.full((448, 448, 3), 255, np.uint8),
    "Grüße, 12345?",
)


class ServerStoppedError(RuntimeError):
    """The server went away, or failed too often, before all items were asked."""


class _ConnectionLostError(RuntimeError):
    """A request ended without an answer of the server; the message says how."""


async def check_server(url: str, option: str, timeout_s: float) -> str:
    """The id of the model at `url`, if it serves one with the probe's tokenizer and processor.

    Raises `ProbeError` naming `option`, the flag that gave the address.
    """
    model = await _model_at(url, option)
    expected = num_prompt_tokens(_PREFLIGHT_PARTS)
    target = Target(url=url, model=model, max_tokens=2, timeout_s=timeout_s)
    async with aiohttp.ClientSession() as http:
        outcome = await send(http, target, to_request(_PREFLIGHT_PARTS, 0), 0)
    where = f"{option} {url}: the model {model!r}"
    if outcome.error:
        raise ProbeError(
            f"{where} refused a question with two images ({outcome.error}). Serve the probe's "
            "checkpoint, with --enable-multimodal if SGLang does not set it."
        )
    if outcome.num_prompt_tokens != expected:
        raise ProbeError(
            f"{where} reads a prompt of {expected} tokens as {outcome.num_prompt_tokens}: its "
            "tokenizer, chat template or image processor is not the probe's. Serve the probe's "
            "checkpoint with the files beside it, and without --tokenizer-path or --chat-template."
        )
    if not outcome.num_output_tokens or None in outcome.logprobs[:1]:
        raise ProbeError(
            f"{where} sends no log-probabilities with its tokens. Serve it with SGLang 0.5.23, "
            "without speculative decoding."
        )
    return model


async def _model_at(url: str, option: str) -> str:
    timeout = aiohttp.ClientTimeout(total=_PREFLIGHT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(f"{url}/v1/models") as answer,
        ):
            answer.raise_for_status()
            return str((await answer.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ProbeError(
            f"{option} {url}: no answer to /v1/models ({error or type(error).__name__}). Start "
            "it, wait until it is ready, and give its address, e.g. http://127.0.0.1:30000."
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ProbeError(
            f"{option} {url}: /v1/models lists no model, so this is no OpenAI server. Give the "
            "address of an SGLang server, without a path."
        ) from error


async def ask(
    url: str,
    model: str,
    suite: Suite,
    *,
    concurrency: int,
    timeout_s: float,
    on_graded: Callable[[int, Graded], None],
) -> None:
    """Ask every item of `suite`, `concurrency` in flight; `on_graded` gets its place and grade.

    An item that the server refuses is graded with its error. After a lost connection, what has
    no answer yet is asked again if the server is still there. Raises `ServerStoppedError`.
    """
    target = Target(url=url, model=model, max_tokens=MAX_TOKENS, timeout_s=timeout_s)
    waiting = set(range(len(suite)))
    num_failed = 0

    def on_done(outcome: Outcome) -> None:
        nonlocal num_failed
        if outcome.error.startswith(_CONNECTION):
            raise _ConnectionLostError(outcome.error.removeprefix(_CONNECTION).strip())
        num_failed += bool(outcome.error)
        waiting.discard(outcome.request_id)
        on_graded(outcome.request_id, grade(suite[outcome.request_id], outcome))
        if num_failed >= MAX_FAILURES:
            raise ServerStoppedError(f"{num_failed} requests failed, the last: {outcome.error}")

    for attempt in range(_MAX_ATTEMPTS):
        requests = Requests(suite, sorted(waiting))
        lost = await _send(target, requests, concurrency, on_done)
        if not lost:
            return
        try:
            await _model_at(url, "")
        except ProbeError as error:
            raise ServerStoppedError(f"the server stopped answering ({lost})") from error
        if attempt + 1 == _MAX_ATTEMPTS:
            raise ServerStoppedError(f"connections broke {_MAX_ATTEMPTS} times, the last: {lost}")


async def _send(
    target: Target, requests: Requests, concurrency: int, on_done: Callable[[Outcome], None]
) -> str:
    """Send `requests`; how a connection was lost, or "". Raises `ServerStoppedError`."""
    lost = ""
    stopped: list[ServerStoppedError] = []
    # A connection that is used twice may be closed by the server just then, when idle for long.
    connector = aiohttp.TCPConnector(limit=concurrency, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        try:
            await send_all(
                http, target, requests, round_=0, concurrency=concurrency, on_done=on_done
            )
        except* _ConnectionLostError as group:
            lost = str(group.exceptions[0])
        except* ServerStoppedError as group:
            stopped = [error for error in group.exceptions if isinstance(error, ServerStoppedError)]
    if stopped:
        raise stopped[0]
    return lost
