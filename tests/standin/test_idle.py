"""Laws of the idle loops: they wait, but never longer than said, and not while there is work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from sglang_moelb.ep.standin import idle
from sglang_moelb.ep.standin.idle import wait_for_request, wait_for_work


@pytest.fixture
def sockets() -> Iterator[tuple[Any, Any]]:
    """A connected pair: one to send, one to receive."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://idle")
        b.connect("inproc://idle")
        yield a, b


def receive(socket: Any, flags: int) -> Any:
    """As SGLang's."""
    return socket.recv(flags=flags)


def test_a_request_that_is_there_is_taken_at_once(
    sockets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "WAIT_MS", 10_000)
    sender, receiver = sockets
    sender.send(b"request")
    begun_s = time.monotonic()
    assert wait_for_request(receive, receiver, zmq.NOBLOCK) == b"request"
    assert time.monotonic() - begun_s < 5


def test_without_a_request_sglang_hears_so_after_the_wait(
    sockets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "WAIT_MS", 50)
    begun_s = time.monotonic()
    with pytest.raises(zmq.Again):
        wait_for_request(receive, sockets[1], flags=zmq.NOBLOCK)
    assert time.monotonic() - begun_s > 0.04


def test_an_idle_round_of_a_rank_waits_and_changes_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert wait_for_work(None, object()) is None
    assert waits == [idle.WAIT_MS / 1e3]
    assert idle.WAIT_MS <= 5, "a request waits so long for an idle rank"
