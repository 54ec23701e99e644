from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ab.support import FAKE_SERVER
from sglang_moelb.ab.server import FREE_PORTS, ServerError, pick_port, serve

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
KEEPER = """
import signal, sys, time
from pathlib import Path
from sglang_moelb.ab.server import serve
ignored = sys.argv[4] == "ignored"
signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
command = [sys.executable, sys.argv[1], "--port", sys.argv[2]]
with serve(command, port=int(sys.argv[2]), log=Path(sys.argv[3]), timeout_s=60) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> bool:
    deadline_s = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return not alive(pid)


def fake(port: int) -> list[str]:
    return [sys.executable, str(FAKE_SERVER), "--port", str(port)]


def test_a_server_is_ended_when_the_block_raises(tmp_path: Path) -> None:
    port = pick_port(None)
    seen: list[int] = []

    def fail_inside() -> None:
        with serve(fake(port), port=port, log=tmp_path / "log", timeout_s=60) as server:
            seen.append(server.process.pid)
            assert alive(server.process.pid)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert wait_until_gone(seen[0])


def test_children_of_a_server_that_never_gets_ready_are_ended_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    never = serve([sys.executable, "-c", PARENT], port=pick_port(None), log=log, timeout_s=2)
    with pytest.raises(ServerError, match=r"not ready after 2 s.*--ready-timeout"):
        never.__enter__()
    child = int(log.read_text().splitlines()[-1])
    assert wait_until_gone(child)


@pytest.mark.parametrize(
    ("number", "interrupts"),
    [
        (signal.SIGINT, "default"),
        (signal.SIGTERM, "default"),
        (signal.SIGHUP, "default"),
        (signal.SIGTERM, "ignored"),  # as in a background job of a script
    ],
)
def test_a_signal_to_us_ends_the_server(
    tmp_path: Path, number: signal.Signals, interrupts: str
) -> None:
    port = str(pick_port(None))
    arguments = [str(FAKE_SERVER), port, str(tmp_path / "log"), interrupts]
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as us:
        assert us.stdout is not None
        pid = int(us.stdout.readline())
        assert alive(pid)
        us.send_signal(number)
        try:
            us.wait(timeout=60)
        finally:
            us.kill()
    assert wait_until_gone(pid)


def test_the_log_starts_with_the_command(tmp_path: Path) -> None:
    port = pick_port(None)
    with serve(fake(port), port=port, log=tmp_path / "a" / "log", timeout_s=60):
        pass
    assert (tmp_path / "a" / "log").read_text().startswith(f"$ {sys.executable} ")


def test_a_free_port_is_none_that_an_outgoing_connection_may_be_given() -> None:
    assert all(pick_port(None) in FREE_PORTS for _ in range(50))
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        assert outgoing.getsockname()[1] >= FREE_PORTS.stop
