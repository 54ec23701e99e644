"""The controller's own process: `python -m sglang_moelb.ep.controller_process SOCKET MEMORY`.

Started by the leader with the numbers of two open files: a socket of packets
(`ep.controller_messages`) and the memory of the counts (`ep.shared_counts`). It ends when the
socket is closed, and the kernel kills it when the process that started it is gone, however that
ended. It computes on no interpreter lock but its own. Light: no torch, no SGLang, no CUDA.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator

from sglang_moelb.ep.controller_messages import (
    MAX_PACKET_BYTES,
    Died,
    FromController,
    NewConfig,
    RawPass,
    Ready,
    Setup,
    ToController,
    encode,
    to_controller,
)
from sglang_moelb.ep.controller_worker import Worker
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.trace.types import TraceError
from sglang_moelb.types import Policy

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Inbox:
    """The packets of the serving process in order, and the faults that they ask for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting: deque[ToController] = deque()
        self._fault = "none"

    def messages(self) -> Iterator[ToController]:
        """Every message until the serving process closes. RuntimeError where a fault says so.

        While the fault is to hang, messages are received and kept. No fault keeps the setup from
        being answered: the server would not start.
        """
        while self._waiting or self._receive():
            begun = not isinstance(self._waiting[0], Setup)
            while begun and self._fault == "hang":
                if not self._receive():
                    return
            if begun and self._fault == "die":
                raise RuntimeError("fault.controller is 'die'")
            yield self._waiting.popleft()

    def _receive(self) -> bool:
        try:
            packet = self._connection.recv(MAX_PACKET_BYTES)
        except ConnectionResetError:
            return False
        if not packet:
            return False
        message = to_controller(packet)
        if isinstance(message, Setup | NewConfig):
            self._fault = message.config.fault.controller
        self._waiting.append(message)
        return True


def serve(connection: socket.socket, memory: int) -> None:
    """Answer the serving process until it closes the connection."""
    messages = Inbox(connection).messages()
    setup = next(messages)
    assert isinstance(setup, Setup), setup
    _die_with(setup.parent_id)
    try:
        worker = Worker(setup, SharedCounts(memory, setup.topology, setup.num_slots))
    except TraceError as error:
        _send(connection, Ready(policy=Policy(epoch=0), problem=f"--moelb-trace: {error}"))
        return
    _send(connection, worker.ready())
    for message in messages:
        if isinstance(message, RawPass):
            _send(connection, worker.read(message))
        elif isinstance(message, NewConfig):
            _send(connection, worker.reconfigure(message.config))
    worker.close()


def main() -> None:
    """Serve, and tell of what the process dies."""
    # Control-C is for the server, whose end is also ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s moelb-controller] %(message)s")
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        serve(connection, int(sys.argv[2]))
    except BrokenPipeError:
        return
    except BaseException as error:
        _send(connection, Died(error=f"{type(error).__name__}: {error}"))
        raise


def _send(connection: socket.socket, message: FromController) -> None:
    connection.send(encode(message))


def _die_with(parent_id: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        sys.exit("sglang_moelb: the serving process has ended before its controller began")


if __name__ == "__main__":
    main()
