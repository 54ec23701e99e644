"""`moelb calibrate URL` finds the trace that a server tells of, or says what is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.calibrate.source import open_source
from sglang_moelb.calibrate.types import CalibrateError

from .world import TOPOLOGY, write_trace

KEY = "secret"


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """`serve(status)`: the URL of a server with that status, which wants KEY."""
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Bearer {KEY}"
            found = self.path == "/moelb/status"
            self.send_response(200 if known and found else 401 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers[-1]).encode())

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def begin(status: Any) -> str:
        answers.append(status)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_folder_that_a_server_traces_to_is_read(
    serve: Callable[[Any], str], tmp_path: Path
) -> None:
    url = serve({"controller": {"trace_folder": str(write_trace(tmp_path / "t", num_passes=3))}})
    for given in (url, url + "/"):
        trace = open_source(given, None, KEY)
        assert trace.header.topology == TOPOLOGY
        assert len(list(trace.passes())) == 3


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"controller": {"trace_folder": ""}}, "--moelb-trace DIR"),
        ({"active": False}, "--moelb-trace DIR"),
        ([], "--moelb-trace DIR"),
        ({"controller": {"trace_folder": "/not/here"}}, "copy the folder"),
    ],
    ids=str,
)
def test_a_server_without_a_trace_to_read_is_said_to_be_one(
    serve: Callable[[Any], str], status: Any, expected: str
) -> None:
    with pytest.raises(CalibrateError, match=expected):
        open_source(serve(status), None, KEY)


def test_a_wrong_key_and_no_server_are_errors_that_name_the_url(
    serve: Callable[[Any], str],
) -> None:
    url = serve({})
    with pytest.raises(CalibrateError, match=f"{url}.*401"):
        open_source(url, None, None)
    with pytest.raises(CalibrateError, match=r"http://127\.0\.0\.1:9"):
        open_source("http://127.0.0.1:9", None, None)
