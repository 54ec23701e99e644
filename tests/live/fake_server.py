"""A server of recorded statuses with the routes of the live view, in a thread.

`python -m tests.live.fake_server --port N --ranks R --layers L` serves one until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from sglang_moelb.ep.live_routes import add_live_routes

from .statuses import status

READY_S = 10.0


def app_of(read: Callable[[], dict[str, Any]]) -> FastAPI:
    """An app with the live view of what `read` returns."""
    app = FastAPI()

    async def status_now() -> dict[str, Any]:
        await asyncio.sleep(0)
        return read()

    add_live_routes(app, status_now)
    return app


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of `app` on a free port, until the end of the block."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until_s = time.monotonic() + READY_S
    while not server.started:
        assert time.monotonic() < until_s, "the fake server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(READY_S)


def main() -> None:
    """Serve statuses that move on with every question."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--layers", type=int, default=96)
    options = parser.parse_args()
    steps = itertools.count(64)

    def read() -> dict[str, Any]:
        return status(num_ranks=options.ranks, num_layers=options.layers, num_passes=next(steps))

    uvicorn.run(app_of(read), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
