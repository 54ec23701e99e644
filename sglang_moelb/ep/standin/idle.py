"""Lets an idle server leave the cores to others.

SGLang's loops ask for work without waiting, and the two ranks and the data-parallel controller of
an idle server keep two cores busy. On a GPU machine that costs nothing; here the same cores run the
experts, the client and the next test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_MS = 5  # a request that comes to an idle rank waits so long at most


def wait_for_work(result: Any, scheduler: Any) -> None:
    """After `Scheduler.on_idle`, which runs once for each round of the loop without a batch."""
    time.sleep(WAIT_MS / 1e3)


def wait_for_request(original: Callable[..., Any], socket: Any, flags: int = 0) -> Any:
    """Around `sock_recv` of the data-parallel controller, which only hands requests on."""
    socket.poll(WAIT_MS)
    return original(socket, flags)
