"""Servers for the end-to-end tests: one at a time, on CPU, started when a test first asks.

A test asks with the `serve` fixture: `serve("vl", "--moelb-mode", "observe")`. The server of the
last call stays up for the next test that asks for the same, and is ended before another starts, so
that memory stays bounded and the order of tests decides how many starts there are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from sglang_moelb.ab.server import end_group, pick_port
from sglang_moelb.demo.models import Kind, write_model
from sglang_moelb.ep.standin.launch import A2A, cpu_environment, cpu_server_args

READY_TIMEOUT_S = 240.0
POLL_S = 0.25
LOG_TAIL_CHARS = 6000


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at `url` and logs to `log`."""

    url: str
    log: Path
    model: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End the server's whole process group and wait until it is gone."""
        end_group(self.process)

    def tail(self) -> str:
        """The end of the log, for a message."""
        return f"end of {self.log}:\n{self.log.read_text(errors='replace')[-LOG_TAIL_CHARS:]}"


Serve: TypeAlias = Callable[..., Server]

# Tests that ask for one server stand together, and the one that kills its controller ends it.
ORDER = (
    "test_bit_identity.py::test_answers",
    "test_bit_identity.py::test_a_lever",
    "test_metrics.py",
    "test_verdict.py",
    "test_live.py",
    "test_idle.py",
    "test_bad_input.py",
    "test_levers.py",
    "test_controller_faults.py",
    "test_resident.py",
    "test_resident_moves.py",
    "test_bit_identity.py::test_room",
    "test_downgrade.py",
    "test_replicate.py",
    "test_bit_identity.py::test_without_flags",
    "test_exactness.py::test_stock_agrees_with_transformers_alone_and_in_batches[vl",
    "test_bit_identity.py::test_text_with_tensor_parallel_attention_without",
    "test_exactness.py::test_stock_agrees_with_transformers_alone_and_in_batches[text-tp",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the end-to-end tests by the server they ask for, so that few are started."""
    here = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    others = [item for item in items if item not in here]
    items[:] = [*others, *sorted(here, key=_place)]


def _place(item: pytest.Item) -> int:
    return next((i for i, part in enumerate(ORDER) if part in item.nodeid), len(ORDER))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What tells one server from another."""

    kind: Kind
    flags: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    ranks: int
    a2a: A2A
    attention_dp: bool


class _Servers:
    """At most one server, kept until another is wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_started = 0
        self._wanted: _Wanted | None = None
        self._server: Server | None = None

    def get(self, wanted: _Wanted) -> Server:
        server = self._server
        if server is not None and self._wanted == wanted and server.process.poll() is None:
            return server
        self.close()
        self._num_started += 1
        log = self._folder / f"server{self._num_started}.log"
        model = write_model(wanted.kind, self._folder / wanted.kind)
        self._server = _start(wanted, model, log)
        self._wanted = wanted
        try:
            _wait_until_ready(self._server)
        except BaseException:
            self.close()
            raise
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`serve(model_kind, *flags, env=None, ranks=2, a2a="deepep", attention_dp=True) -> Server`.

    Further flags are SGLang's and win over the defaults; `env` is laid over the environment.
    Raises RuntimeError with the end of the log when the server dies or is not ready in time.
    """
    servers = _Servers(tmp_path_factory.mktemp("servers"))

    def get(
        model_kind: Kind,
        *flags: str,
        env: Mapping[str, str] | None = None,
        ranks: int = 2,
        a2a: A2A = "deepep",
        attention_dp: bool = True,
    ) -> Server:
        return servers.get(
            _Wanted(
                kind=model_kind,
                flags=flags,
                env=tuple(sorted((env or {}).items())),
                ranks=ranks,
                a2a=a2a,
                attention_dp=attention_dp,
            )
        )

    # A runner that gives up on pytest sends SIGTERM, at which pytest would leave the server behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield get
    finally:
        servers.close()
        signal.signal(signal.SIGTERM, before)


def _start(wanted: _Wanted, model: Path, log: Path) -> Server:
    port = pick_port(None)
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += cpu_server_args(wanted.ranks, wanted.a2a, attention_dp=wanted.attention_dp)
    command += ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += wanted.flags
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **cpu_environment(wanted.ranks), **dict(wanted.env)},
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}", log, model, process)


def _wait_until_ready(server: Server) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if (code := server.process.poll()) is not None:
            raise RuntimeError(f"the server ended with exit code {code}; {server.tail()}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(POLL_S)
    raise RuntimeError(f"the server was not ready in {READY_TIMEOUT_S:.0f} s; {server.tail()}")
