"""One question to a server's `/moelb/live`, with an error that a user can act on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

import httpx

from sglang_moelb.live.wire import AGE_HEADER, Live, decode

MAX_BODY_BYTES = 4 << 20  # an answer has kilobytes; what sends more is not our server
SHOWN_CHARS = 60


class LiveError(RuntimeError):
    """There is no live view at this URL; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """An answer, and how old it already was when it was sent."""

    live: Live
    age_s: float


def base_of(url: str) -> str:
    """The server's address, without a slash or a path of ours at the end. Raises `LiveError`."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise LiveError(f"{url!r} is not a URL ({error}); write http://HOST:PORT") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        hint = f"http://{url.strip()}" if ":" in url and "/" not in url else "http://HOST:PORT"
        raise LiveError(f"{url!r} is not a URL of a server; write {hint}")
    if parsed.query or parsed.fragment or parsed.userinfo:
        raise LiveError(
            f"{url!r} has more than an address (a query, a fragment or a user name); give "
            "http://HOST:PORT, and a key with --api-key"
        )
    if " " in url.strip() or not 0 < (parsed.port or 80) < 1 << 16:
        raise LiveError(f"{url!r} is not a URL of a server: its host or port cannot be one")
    path = parsed.path.rstrip("/").removesuffix("/live").removesuffix("/moelb")
    return str(parsed.copy_with(path=path)).rstrip("/")


class LiveClient:
    """Asks one server, a question at a time, over a connection that it keeps."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = base_of(url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise LiveError("--api-key has characters that no key in a header can have")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            timeout=timeout_s,
            trust_env=False,
            headers={"Accept": "application/json", "Accept-Encoding": "gzip"},
        )
        if api_key is not None:
            self._http.headers["Authorization"] = f"Bearer {api_key}"

    def __enter__(self) -> LiveClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def fetch(self) -> Fetched:
        """Ask once. Raises `LiveError` for everything but a live view."""
        try:
            answer, body = self._get(f"{self.url}/moelb/live")
        except httpx.TimeoutException as error:
            raise LiveError(
                f"{self.url} did not answer within {self._timeout_s:g} s; over a slow link use a "
                "longer --timeout"
            ) from error
        except httpx.ConnectError as error:
            raise LiveError(
                f"{self.url} cannot be reached ({error}); is the server up, and the address right?"
            ) from error
        except httpx.HTTPError as error:
            raise LiveError(
                f"{self.url} does not answer as an HTTP server "
                f"({str(error) or type(error).__name__}); is the address right?"
            ) from error
        if answer.status_code != 200:
            raise LiveError(self._refusal(answer))
        try:
            return Fetched(live=decode(body), age_s=_age_s(answer))
        except ValueError as error:
            raise LiveError(f"{self.url}/moelb/live: {error}{_start_of(body)}") from error

    def _get(self, url: str) -> tuple[httpx.Response, bytes]:
        """The answer and its body, within the timeout as a whole and a bound of bytes."""
        until_s = time.monotonic() + self._timeout_s
        body = bytearray()
        with self._http.stream("GET", url) as answer:
            for part in answer.iter_bytes():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise LiveError(f"{url} answers with more than any live view has; not ours")
                if time.monotonic() > until_s:
                    raise httpx.ReadTimeout("the answer takes too long")
        return answer, bytes(body)

    def _refusal(self, answer: httpx.Response) -> str:
        code = answer.status_code
        if code == 404:
            return (
                f"{self.url} answers, but has no /moelb/live: the server runs without the "
                "sglang_moelb plugin, an old one, or no --moelb flag. Start it with --moelb-mode "
                "observe; `moelb doctor` on its machine says whether the plugin is found"
            )
        if code in (401, 403) and self._api_key is None:
            return f"{self.url} needs a key (HTTP {code}); give the server's with --api-key"
        if code in (401, 403):
            return f"{self.url} refuses the key of --api-key (HTTP {code}); give the server's"
        if answer.is_redirect:
            return f"{self.url} redirects to {answer.headers.get('location')}; give that address"
        return f"{self.url}/moelb/live answers HTTP {code}; see the server's log"


def _age_s(answer: httpx.Response) -> float:
    raw = answer.headers.get(AGE_HEADER, "0")
    return int(raw) / 1e3 if raw.isdigit() else 0.0


def _start_of(body: bytes) -> str:
    start = body[:SHOWN_CHARS].decode(errors="replace").split("\n")[0]
    return f"; it begins {start!r}" if start else "; it is empty"
