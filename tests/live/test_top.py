"""`moelb top` in a real terminal and in a pipe: what it shows, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_moelb.cli import build

from .fake_server import Serving, app_of
from .statuses import status

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from sglang_moelb.cli import main; main()", "top"]
WAIT_S = 30.0
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
ESCAPES = re.compile(rb"\x1b(\[[0-9;?]*[A-Za-z]|[\]PX^_].*?(\x07|\x1b\\)|.)")
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture
def server() -> Iterator[Serving]:
    served = status(num_ranks=4, num_layers=8)
    with Serving(app_of(lambda: served)) as serving:
        yield serving


class Terminal:
    """A process on a terminal of its own, 80 x 24."""

    def __init__(self, *arguments: str) -> None:
        self.output = b""
        self._file, other = pty.openpty()
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(other)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=ROOT,
            env={
                **os.environ,
                "TERM": "xterm-256color",
                "PYTHONPATH": str(ROOT),
                "LC_ALL": "C.UTF-8",
            },
            start_new_session=True,
        )
        self._other = other

    def until(self, text: str) -> None:
        """Read until `text` has been shown."""
        until_s = time.monotonic() + WAIT_S
        while text not in self.shown():
            assert time.monotonic() < until_s, (text, self.shown()[-3000:])
            ready, _, _ = select.select([self._file], [], [], 0.2)
            if ready:
                self.output += os.read(self._file, 65536)

    def shown(self) -> str:
        """All text so far, without escape codes."""
        return ESCAPES.sub(b"", self.output).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._file, keys)

    def end(self) -> int:
        """The exit code, once it has ended; reads what is left."""
        until_s = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < until_s, self.shown()[-3000:]
            ready, _, _ = select.select([self._file], [], [], 0.1)
            if ready:
                self.output += os.read(self._file, 65536)
        while select.select([self._file], [], [], 0.1)[0]:
            self.output += os.read(self._file, 65536)
        return self.process.wait()

    def close(self) -> None:
        """End the process if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._file)
        os.close(self._other)

    def restored(self) -> bool:
        """Whether the terminal's settings and screen are as they were."""
        left = self.output.rfind(LEAVE_SCREEN) > self.output.rfind(ENTER_SCREEN) >= 0
        return left and termios.tcgetattr(self._other) == self.before


@pytest.fixture
def terminal(server: Serving) -> Iterator[Terminal]:
    opened = Terminal(server.url, "--interval", "0.1", "--timeout", "2")
    opened.until("last decisions")
    yield opened
    opened.close()


@pytest.mark.parametrize("how", ["q", "Q", "ctrl-c", "SIGTERM"])
def test_it_ends_cleanly(terminal: Terminal, how: str) -> None:
    if how == "SIGTERM":
        terminal.process.terminate()
    elif how == "ctrl-c":
        terminal.process.send_signal(signal.SIGINT)
    else:
        terminal.type(how.encode())
    assert terminal.end() == 0
    assert terminal.restored()
    assert "Traceback" not in terminal.shown()


def test_keys_turn_the_map_and_others_do_nothing(terminal: Terminal) -> None:
    terminal.type(b"xa")
    terminal.until("after (b: before)")
    terminal.type(b"b")
    terminal.until("before (a: after)")
    terminal.type(b"q")
    assert terminal.end() == 0


def test_a_server_that_stops_is_said_to_be_gone_and_the_view_goes_on(
    terminal: Terminal, server: Serving
) -> None:
    server.stop()
    terminal.until("STALE")
    terminal.until("cannot be reached")
    terminal.type(b"q")
    assert terminal.end() == 0
    assert terminal.restored()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_in_a_pipe_one_frame_is_printed_without_escape_codes(server: Serving) -> None:
    done = run(server.url, COLUMNS="100", LINES="30", **UTF8)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in done.stdout
    assert "▒" in done.stdout
    assert done.stdout.count("last decisions") == 1


def test_where_the_encoding_has_only_ascii_the_frame_has_too(server: Serving) -> None:
    done = run(server.url, "--once", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "last decisions" in done.stdout


@pytest.mark.parametrize(
    ("url", "part"), [("nonsense", "not a URL"), ("http://127.0.0.1:9", "cannot be reached")]
)
def test_without_a_live_view_at_the_start_it_ends_with_code_2_and_one_line(
    url: str, part: str
) -> None:
    for arguments in ([url], [url, "--once"]):
        result = CliRunner().invoke(build(), ["top", *arguments])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert part in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", [["--interval", "0"], ["--timeout", "-1"], ["--interval", "x"]])
def test_wrong_options_are_refused(option: list[str]) -> None:
    result = CliRunner().invoke(build(), ["top", "http://127.0.0.1:9", *option])
    assert result.exit_code == 2
    assert option[0] in result.stderr
