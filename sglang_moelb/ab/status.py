"""Follow a server's passes by polling `GET /moelb/status` while it is under load."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from sglang_moelb.ab.types import Observed, PassRecord, Status

POLL_S = 0.25
_DECODER = msgspec.json.Decoder(Status)


class StatusError(RuntimeError):
    """The status exists but cannot be read; the message says why."""


async def read_status(http: aiohttp.ClientSession, url: str) -> Status | None:
    """The server's status, or None if it has no such route or the plugin does nothing there.

    Raises `StatusError` for any other answer, `aiohttp.ClientError` when there is no answer.
    """
    async with http.get(f"{url}/moelb/status") as answer:
        body = await answer.read()
    if answer.status == 404:
        return None
    if answer.status != 200:
        raise StatusError(f"GET /moelb/status: HTTP {answer.status}")
    try:
        status = _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise StatusError(f"GET /moelb/status: unexpected answer ({error})") from error
    return status if status.active else None


class Follower:
    """Collects each pass once, by its step. Start with the status after the warm-up."""

    def __init__(self, first: Status) -> None:
        self._first = first
        self._last = first
        self._after_step = max((record.step for record in first.recent), default=-1)
        self._passes: dict[int, PassRecord] = {}
        self._states: dict[str, None] = {}
        self._error = ""
        self._note(first)

    async def poll(self, http: aiohttp.ClientSession, url: str) -> None:
        """Read the status every `POLL_S` until cancelled or until the server is gone."""
        while not self._error:
            await self.read(http, url)
            await asyncio.sleep(POLL_S)

    async def read(self, http: aiohttp.ClientSession, url: str) -> None:
        """Read once. A failure is kept as the reason why the records end."""
        try:
            status = await read_status(http, url)
        except (aiohttp.ClientError, StatusError, ConnectionError, TimeoutError) as error:
            self._error = f"{type(error).__name__}: {error}"
            return
        if status is None:
            self._error = "the status route is gone"
            return
        self._note(status)

    def observed(self) -> Observed:
        """Everything seen since the start, passes in the order of their steps."""
        return Observed(
            first=self._first,
            last=self._last,
            passes=tuple(self._passes[step] for step in sorted(self._passes)),
            controller_states=tuple(self._states),
            error=self._error,
        )

    def _note(self, status: Status) -> None:
        self._last = status
        if state := status.controller.get("state"):
            self._states[state] = None
        for record in status.recent:
            if record.step > self._after_step:
                self._passes[record.step] = record
