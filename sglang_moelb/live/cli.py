"""The command `moelb top`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from sglang_moelb.live.client import LiveClient, LiveError
from sglang_moelb.live.poller import Poller, Watch
from sglang_moelb.live.screen import TICK_S, look_of, picture, show


def top(
    url: Annotated[str, typer.Argument(help="The server, http://HOST:PORT.", show_default=False)],
    api_key: Annotated[
        str | None,
        typer.Option(help="The server's --api-key, if it has one.", show_default=False),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two questions.")] = 0.5,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for one answer, at most.")
    ] = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and end; also when piped.")
    ] = False,
) -> None:
    """Watch a server: load of every rank and layer, lever and reason, quality, time, liveness.

    q or Ctrl-C ends; a and b show the loads after and before the lever. The same view as a page is
    at URL/moelb/. Exit code 2 when there is no live view at URL at the start.
    """
    console = Console()
    try:
        with LiveClient(url, api_key, timeout) as client:
            first = client.fetch()
            watch = Watch(client.url, first, time.monotonic())
            if once or not console.is_terminal:
                view = watch.view(time.monotonic())
                console.print(picture(view, console, look_of(console)), soft_wrap=True)
                return
            poller = Poller(client.fetch, watch, interval)
            poller.start()
            show(poller.view, console, min(TICK_S, interval))
            poller.stop()
    except LiveError as error:
        failed = Console(stderr=True)
        failed.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
