"""Every URL that is no live view is refused by name and with the fix."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse

from sglang_moelb.live.client import LiveClient, LiveError, base_of

from .fake_server import Serving, app_of
from .statuses import status


def refused(url: str, key: str | None = None, timeout_s: float = 5.0) -> str:
    with pytest.raises(LiveError) as caught, LiveClient(url, key, timeout_s) as client:
        client.fetch()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("", "write http://HOST:PORT"),
        ("nonsense", "write http://HOST:PORT"),
        ("localhost:30000", "write http://localhost:30000"),
        ("ftp://host:1", "write http://HOST:PORT"),
        ("http://", "write http://HOST:PORT"),
        ("http://[::1", "write http://HOST:PORT"),
        ("http://a b:1", "host or port"),
        ("http://host:99999", "host or port"),
        ("http://host:port", "write http://HOST:PORT"),
        ("http://user:secret@host:1", "--api-key"),
        ("http://host:1/?key=x", "more than an address"),
        ("http://host:1/#top", "more than an address"),
    ],
)
def test_what_is_not_a_url_is_named_with_what_to_write(url: str, fix: str) -> None:
    with pytest.raises(LiveError) as caught:
        base_of(url)
    assert repr(url) in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.parametrize("tail", ["", "/", "/moelb", "/moelb/", "/moelb/live"])
def test_addresses_of_the_page_and_of_the_answer_are_the_servers(tail: str) -> None:
    assert base_of(f" http://host:30000{tail} ") == "http://host:30000"
    assert base_of(f"https://proxy/models/a{tail}") == "https://proxy/models/a"


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    for key in ("schlüssel", "a\nb"):
        assert "--api-key" in refused("http://127.0.0.1:1", key)


def test_a_port_without_a_server_is_named() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        message = refused(url)
    assert f"{url} cannot be reached" in message
    assert "is the server up" in message


def odd_app() -> FastAPI:
    """Servers that are not ours, one below each path."""
    app = FastAPI()
    answers: dict[str, Any] = {
        "html": lambda: HTMLResponse("<!doctype html><p>hello"),
        "json": lambda: JSONResponse({"status": "ok"}),
        "list": lambda: JSONResponse([1, 2]),
        "empty": lambda: HTMLResponse(""),
        "newer": lambda: JSONResponse({"moelb_live": 99}),
        "locked": lambda: JSONResponse({"error": "Unauthorized"}, 401),
        "forbidden": lambda: JSONResponse({"error": "Forbidden"}, 403),
        "broken": lambda: JSONResponse({"error": "x"}, 500),
        "moved": lambda: RedirectResponse("https://elsewhere/moelb/live"),
        "endless": lambda: StreamingResponse(b"x" * 65536 for _ in itertools.count()),
    }
    for name, answer in answers.items():
        app.add_api_route(f"/{name}/moelb/live", answer, response_model=None)
    return app


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    with Serving(odd_app()) as server:
        yield server.url


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nothing", ["has no /moelb/live", "--moelb-mode", "moelb doctor"]),
        ("html", ["not a JSON object", "<!doctype html>"]),
        ("json", ["not a live view of sglang_moelb"]),
        ("list", ["not a JSON object"]),
        ("empty", ["not a JSON object", "empty"]),
        ("newer", ["version 99", "upgrade"]),
        ("locked", ["needs a key (HTTP 401)", "--api-key"]),
        ("forbidden", ["needs a key (HTTP 403)", "--api-key"]),
        ("broken", ["HTTP 500", "server's log"]),
        ("moved", ["redirects to https://elsewhere/moelb/live"]),
        ("endless", ["more than any live view"]),
    ],
)
def test_a_server_that_is_not_ours_is_named_with_the_fix(
    odd: str, name: str, parts: list[str]
) -> None:
    message = refused(f"{odd}/{name}")
    assert f"{odd}/{name}" in message
    assert all(part in message for part in parts), message


def test_a_wrong_key_is_told_from_no_key(odd: str) -> None:
    message = refused(f"{odd}/locked", "wrong")
    assert "refuses the key of --api-key" in message
    assert "wrong" not in message, "keys are not printed"


def speak(answer: bytes, *, hold_s: float = 0.0) -> tuple[str, threading.Thread]:
    """A port whose one client gets `answer`, whatever it asks."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener, listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(answer)
            time.sleep(hold_s)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", thread


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"]
)
def test_a_port_that_does_not_speak_http_is_named(answer: bytes) -> None:
    url, thread = speak(answer)
    assert f"{url} does not answer as an HTTP server" in refused(url)
    thread.join(5)


def test_a_server_that_keeps_silent_is_given_up_after_the_timeout() -> None:
    url, thread = speak(b"", hold_s=1.0)
    begun_s = time.monotonic()
    message = refused(url, timeout_s=0.3)
    assert time.monotonic() - begun_s < 1.0
    assert "did not answer within 0.3 s" in message
    assert "--timeout" in message
    thread.join(5)


def test_an_answer_that_drips_is_given_up_after_the_timeout_as_a_whole() -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.05)
            yield b" "

    app = FastAPI()
    app.add_api_route("/moelb/live", lambda: StreamingResponse(drip()), response_model=None)
    with Serving(app) as server:
        begun_s = time.monotonic()
        assert "did not answer within 0.3 s" in refused(server.url, timeout_s=0.3)
        assert time.monotonic() - begun_s < 2.0


def test_a_live_view_is_read_compressed_and_with_its_age() -> None:
    with Serving(app_of(status)) as server, LiveClient(server.url, None, 5.0) as client:
        fetched = client.fetch()
        assert fetched.live.mode == "auto"
        assert 0.0 <= fetched.age_s < 5.0
