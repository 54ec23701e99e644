"""A server of recorded statuses with the routes of the live view, in a thread.

`python -m tests.live.fake_server --port N --ranks R --layers L` serves one until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
import time
from collections.abc import Callable
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


class Serving:
    """An app on a free port in a thread, from the start of a `with` block to `stop` or its end."""

    def __init__(self, app: Any) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Serving:
        self._thread.start()
        until_s = time.monotonic() + READY_S
        while not self._server.started:
            assert time.monotonic() < until_s, "the fake server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask_to_stop(self) -> None:
        """Close the port soon; for handlers of the app itself."""
        self._server.should_exit = True
        self._server.force_exit = True

    def stop(self) -> None:
        """Close the port."""
        self.ask_to_stop()
        self._thread.join(READY_S)


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
