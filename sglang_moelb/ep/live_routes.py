"""`GET /moelb/live` and the page `GET /moelb/`: many viewers cost the schedulers one question.

The state of the schedulers is asked for at most every `KEPT_S`, by one question at a time, and
only while somebody looks. A scheduler that does not answer leaves viewers with its last answer and
the age of that in the header `Moelb-Age-Ms`.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from sglang_moelb.live.answer import live_of
from sglang_moelb.live.wire import AGE_HEADER, VERSION, Live, encode

KEPT_S = 0.25
WAIT_S = 1.0  # then a viewer gets the last answer, with its age
SILENT = "the schedulers have not answered yet: the server is starting, or they hang; see its log"
# The page brings all it needs: nothing is loaded from elsewhere, or sent there.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An encoded answer, plain and compressed, and when the schedulers gave it."""

    plain: bytes
    packed: bytes
    at_s: float


class LiveAnswers:
    """The newest compact status. All methods run in the HTTP server's event loop."""

    def __init__(
        self,
        read: Callable[[], Awaitable[dict[str, Any]]],
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_S,
    ) -> None:
        self._read = read
        self._clock = clock
        self._wait_s = wait_s
        self._newest: Answer | None = None
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> tuple[Answer, int]:
        """The answer and its age in milliseconds. Raises what the reading of the status raised."""
        newest = self._newest
        if newest is None or self._clock() - newest.at_s >= KEPT_S:
            await self._refresh()
        now_s = self._clock()
        if self._newest is None:
            return _packed(Live(moelb_live=VERSION, active=False, reason=SILENT), now_s), 0
        return self._newest, int(1e3 * (now_s - self._newest.at_s))

    async def _refresh(self) -> None:
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        asking = self._asking
        # A question that is under way is never cancelled: its answer would be taken for the next.
        done, _ = await asyncio.wait({asking}, timeout=self._wait_s)
        if done:
            asking.result()

    async def _ask(self) -> None:
        try:
            self._newest = _packed(live_of(await self._read()), self._clock())
        finally:
            self._asking = None


def add_live_routes(app: Any, read: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Mount the compact status and the page on SGLang's FastAPI app; `read` gives a status."""
    from fastapi import Request
    from fastapi.responses import Response

    answers = LiveAnswers(read)
    page = files("sglang_moelb.live").joinpath("page.html").read_bytes()

    async def get_live(request: Request) -> Response:
        answer, age_ms = await answers.get()
        headers = {AGE_HEADER: str(age_ms), "Cache-Control": "no-store", "Vary": "Accept-Encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(answer.plain, media_type="application/json", headers=headers)
        headers["Content-Encoding"] = "gzip"
        return Response(answer.packed, media_type="application/json", headers=headers)

    async def get_page() -> Response:
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    # FastAPI reads annotations by name in this module's globals, where Request is not imported.
    get_live.__annotations__ = {"request": Request, "return": None}
    app.add_api_route("/moelb/live", get_live, methods=["GET"], response_model=None)
    app.add_api_route("/moelb/", get_page, methods=["GET"], response_model=None)


def _packed(live: Live, at_s: float) -> Answer:
    plain = encode(live)
    return Answer(plain, gzip.compress(plain, compresslevel=6, mtime=0), at_s)
