"""Start an SGLang server in its own process group, wait until it serves, and always end it."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sglang_moelb.ab.arms import HOST
from sglang_moelb.ab.types import AbError

POLL_S = 0.25
TERM_GRACE_S = 10.0
CHILD_GRACE_S = 2.0  # for what is left of the group once the main process is gone
LOG_TAIL_LINES = 25
FREE_PORTS = range(20_000, 32_000)


class ServerError(RuntimeError):
    """A server did not come up; the message ends with the last lines of its log."""


class Server:
    """A running server process. Made by `serve`, which also ends it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def death(self) -> str:
        """Why the process is gone, with the end of its log, or "" while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the server died ({how}); {tail(self.log)}"


def pick_port(port: int | None) -> int:
    """`port` if nothing listens there, or a free one if None. Raises `AbError` when in use.

    A free one is below the ports that systems give to outgoing connections: a server takes half a
    minute to listen on it, and until then any connection might be given one of those.
    """
    if port is None:
        # Not by the seeded generator: programs that run side by side must not try the same ports.
        free = (secrets.choice(FREE_PORTS) for _ in FREE_PORTS)
        return next(one for one in free if not _refusal(one))
    if refusal := _refusal(port):
        raise AbError(
            f"--port {port}: cannot be used on {HOST} ({refusal}). End what listens "
            "there, give another port, or leave --port out to take a free one."
        )
    return port


def _refusal(port: int) -> str:
    """Why nothing can listen on `port`, or ""."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return str(error.strerror)
    return ""


@contextmanager
def serve(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    timeout_s: float,
    on_wait: Callable[[float], None] = lambda _: None,
) -> Iterator[Server]:
    """Run `command` until the block ends; yields when `/health` answers 200.

    Output goes to `log`. The whole process group is ended however the block is left. `on_wait`
    gets the seconds waited so far. Raises `ServerError` when the process ends or `timeout_s`
    pass first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _terminate_like_ctrl_c():
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(process, f"http://{HOST}:{port}", log)
        try:
            _wait_ready(server, timeout_s, on_wait)
            yield server
        finally:
            end_group(process)


def tail(log: Path, num_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of `log`, with its name."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"last lines of {log}:", *lines[-num_lines:]])


def _wait_ready(server: Server, timeout_s: float, on_wait: Callable[[float], None]) -> None:
    start_s = time.monotonic()
    while (waited_s := time.monotonic() - start_s) < timeout_s:
        if death := server.death():
            raise ServerError(death)
        if _healthy(server.url):
            return
        on_wait(waited_s)
        time.sleep(POLL_S)
    raise ServerError(
        f"the server was not ready after {timeout_s:.0f} s; give it longer with --ready-timeout. "
        + tail(server.log)
    )


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a server that leads a process group, and all of the group, and wait for it."""
    # Only the main process at first: SGLang takes the death of a scheduler for a crash, and spends
    # seconds on diagnosing it.
    process.terminate()
    deadline_s = time.monotonic() + TERM_GRACE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.1)
    deadline_s = time.monotonic() + CHILD_GRACE_S
    while _signal_group(process.pid, 0) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into Ctrl-C meanwhile, so that a server never outlives us."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job of a script
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    previous = {number: signal.signal(number, interrupt) for number in _ENDINGS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
