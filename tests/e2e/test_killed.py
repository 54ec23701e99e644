"""A server whose main process is killed leaves no other process behind."""

from __future__ import annotations

import psutil
import pytest

from .conftest import Serve
from .talk import NUM_RANKS, OBSERVE, until

pytestmark = pytest.mark.e2e


def runs(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def test_no_process_outlives_the_main_process(serve: Serve) -> None:
    server = serve("text", *OBSERVE, attention_dp=False)
    main = psutil.Process(server.process.pid)
    others = main.children(recursive=True)
    assert len(others) > NUM_RANKS
    main.kill()
    server.process.wait()
    until(lambda: not any(runs(other) for other in others))
