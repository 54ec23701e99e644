"""What a server on CPU spares the cores that it shares with others: imports, and idle loops."""

from __future__ import annotations

import time

import psutil
import pytest

from sglang_moelb.environment import SPAWN_VARIABLE

from .conftest import Serve, Server
from .talk import NUM_RANKS, OBSERVE, SHORT, observed, say, status, until

pytestmark = pytest.mark.e2e

WATCHED_S = 3.0
MAX_CORES = 0.6  # without the stand-in's waits it is as many as there are, up to three


def cpu_s(server: Server) -> float:
    """Processor time that all processes of the server have used."""
    main = psutil.Process(server.process.pid)
    return sum(sum(p.cpu_times()[:2]) for p in (main, *main.children(recursive=True)))


def test_an_idle_server_leaves_the_cores_to_others(serve: Serve) -> None:
    server = observed(serve)
    say(server, SHORT)
    time.sleep(0.5)
    begun_s, used_s = time.monotonic(), cpu_s(server)
    time.sleep(WATCHED_S)
    used_s = cpu_s(server) - used_s
    assert used_s / (time.monotonic() - begun_s) < MAX_CORES


@pytest.mark.slow
def test_processes_that_are_spawned_as_on_gpus_have_the_plugin_too(serve: Serve) -> None:
    server = serve("text", *OBSERVE, env={SPAWN_VARIABLE: "1"}, attention_dp=False)
    main = psutil.Process(server.process.pid)
    assert not [p for p in main.children() if "multiprocessing.forkserver" in str(p.cmdline())]
    say(server, SHORT)
    until(lambda: [one["phase"] for one in status(server)["recent"]].count("prefill") > 0)


def test_processes_are_forked_from_one_that_has_imported_sglang_and_has_no_thread(
    serve: Serve,
) -> None:
    main = psutil.Process(observed(serve).process.pid)
    (source,) = [p for p in main.children() if "multiprocessing.forkserver" in str(p.cmdline())]
    assert source.num_threads() == 1, "a fork would leave the other threads and their locks behind"
    assert len(source.children()) == NUM_RANKS + 2, "ranks, their controller, the detokenizer"
