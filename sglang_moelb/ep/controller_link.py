"""The leader's end of its controller process: passes go out, policies come back, nobody waits.

All methods are for the serving thread, which does the little that is to be done itself, at moments
of its choosing: a thread that computed beside it would take the interpreter lock when the serving
thread is on the critical path. Only where no pass follows does a thread of ours look after what is
left. If the process is dead or does not answer, the policy is `none` from the next pass on, and
the status says so.

Shape letters: R ranks, L MoE layers, W width of a layer's row of counts.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from sglang_moelb.config import Config
from sglang_moelb.controller.watchdog import in_mode, is_stale
from sglang_moelb.ep import records
from sglang_moelb.ep.controller_messages import (
    MAX_PACKET_BYTES,
    UNCHANGED,
    Answer,
    Died,
    FromController,
    NewConfig,
    Ready,
    Setup,
    encode,
    from_controller,
)
from sglang_moelb.ep.pin_slots import pin_slots
from sglang_moelb.ep.records import ClosedPass, PassLog
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.ep.status import NUM_RECENT
from sglang_moelb.types import Lever, Policy, Topology

logger = logging.getLogger("sglang_moelb")

State = Literal["running", "dead", "hung"]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 1.0
LULL_S = 0.05  # passes of a server that has nothing to do are handed over after this time


class ControllerError(RuntimeError):
    """The controller process cannot begin; the message says why."""


class ControllerLink:
    """Owns the controller process. Raises `ControllerError` where it cannot begin."""

    def __init__(
        self,
        topology: Topology,
        config: Config,
        *,
        rank: int,
        device: torch.device,
        has_metrics: bool = False,
        trace: str = "",
    ) -> None:
        self._config = config
        self._shared = SharedCounts.create(topology)
        self._slots = records.slots_of(self._shared)
        if device.type == "cuda" and (problem := pin_slots(self._shared, self._slots)):
            raise ControllerError(problem)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sglang_moelb.ep.controller_process",
             str(theirs.fileno()), str(self._shared.file)],
            pass_fds=(theirs.fileno(), self._shared.file),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        ready = self._begin(
            Setup(
                parent_id=os.getpid(),
                topology=topology,
                rank=rank,
                config=config,
                num_slots=len(self._slots),
                has_metrics=has_metrics,
                trace=trace,
            )
        )
        self._policy = ready.policy
        self._totals = ready.totals
        self._answer: Answer | None = None
        self._verdict = self._heat = UNCHANGED
        self._trace_state = "running" if trace else "off"
        self._trace_folder = str(Path(trace).resolve()) if trace else ""
        self._rows: deque[msgspec.Raw] = deque(maxlen=NUM_RECENT)
        self._error = ""
        self._is_closed = False
        self._last_state: State = "running"
        self.on_state: Callable[[State], None] = lambda state: None
        self.on_config: Callable[[Config], None] = lambda config: None
        self._outbox: deque[ClosedPass | bytes] = deque()
        self._told_s: deque[float] = deque()  # of each pass that is not answered yet
        self._num_submitted = self._num_answered = 0
        self._turn = threading.Lock()
        self._left = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="moelb-lull", daemon=True)
        self._thread.start()

    def submit(
        self, log: PassLog, counts_RLW: torch.Tensor, stats_R8: torch.Tensor | None
    ) -> None:
        """Hand over a pass whose last work is enqueued; no host sync on CUDA.

        It is left out while the controller is as far behind as there are slots.
        """
        if self._num_submitted - self._num_answered >= len(self._slots):
            return
        slot = self._slots[self._num_submitted % len(self._slots)]
        self._num_submitted += 1
        self._outbox.append(records.close(log, counts_RLW, stats_R8, slot))
        self._take_turn(self._tell)
        if not self._left.is_set():
            self._left.set()

    def pass_begun(self) -> None:
        """Use the time in which the ranks' messages of a new pass travel."""
        if self._outbox:
            self._take_turn(self._tell)

    def reconfigure(self, config: Config) -> None:
        """Change the configuration while running; takes effect with the next policy."""
        self._config = config
        self._policy = in_mode(config.mode, replace(self._policy, move_ms=config.resident.move_ms))
        self.on_config(config)
        self._outbox.append(encode(NewConfig(config=config)))
        self._take_turn(self._tell)
        self._left.set()

    def stop(self) -> None:
        """End the process, at the latest after a second."""
        self._stopping.set()
        self._left.set()
        self._thread.join()
        self._socket.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def policy(self) -> Policy:
        """The policy for the next pass; `none` with the reason while nobody controls."""
        state = self.state
        if state != self._last_state:
            self._last_state = state
            self.on_state(state)
        if state == "running":
            return in_mode(self._config.mode, self._policy)
        why = f"controller process is {state}" + (f": {self._error}" if self._error else "")
        return replace(self._policy, lever=Lever.NONE, reason=why)

    @property
    def state(self) -> State:
        """Whether the process answers; takes in what it has said."""
        self._take_turn(self._hear)
        if self._is_closed:
            code = self._process.poll()
            if code is not None and not self._error:
                self._error = _how_it_ended(code)
            return "dead"
        told_s = tuple(self._told_s)
        stale = is_stale(
            num_submitted=len(told_s),
            num_done=0,
            oldest_unread_age_s=time.monotonic() - told_s[0] if told_s else 0.0,
            timeout_s=self._config.controller.timeout_ms / 1e3,
        )
        return "hung" if stale else "running"

    def status(self) -> dict[str, Any]:
        """Controller, totals, last passes and verdict as the status shows them, JSON types."""
        state = self.state
        unpacked = msgspec.msgpack.decode
        controller: dict[str, Any] = {
            "state": state,
            "process_id": self._process.pid,
            "num_passes": self._num_submitted,
            "trace": self._trace_state,
        }
        controller["trace_folder"] = self._trace_folder
        if self._answer:
            controller["last_decision"] = unpacked(self._answer.decision)
        return {
            "controller": controller,
            "totals": unpacked(self._totals),
            "recent": [unpacked(row) for row in tuple(self._rows)],
            "heat": unpacked(self._heat) if self._heat else None,
            "verdict": unpacked(self._verdict) if self._verdict else None,
        }

    def _begin(self, setup: Setup) -> Ready:
        """Say what is wanted and wait for the controller to be ready."""
        self._socket.settimeout(START_TIMEOUT_S)
        try:
            self._socket.send(encode(setup))
            packet = self._socket.recv(MAX_PACKET_BYTES)
            message = from_controller(packet) if packet else None
        except (TimeoutError, ConnectionError) as error:
            self._process.kill()
            raise ControllerError(f"the controller process did not begin ({error})") from error
        if not isinstance(message, Ready) or message.problem:
            self._process.kill()
            self._process.wait()
            if isinstance(message, Ready):
                raise ControllerError(message.problem)
            why = message.error if isinstance(message, Died) else "the log says why"
            raise ControllerError(f"the controller process ended: {why}")
        self._socket.setblocking(False)
        return message

    def _take_turn(self, work: Callable[[], None]) -> None:
        """Tell what is to be told or take what has come, unless the other thread does just that."""
        if self._turn.acquire(blocking=False):
            try:
                work()
            except ConnectionError:
                self._is_closed = True
                self._outbox.clear()
            finally:
                self._turn.release()

    def _tell(self) -> None:
        while self._outbox:
            first = self._outbox[0]
            if isinstance(first, ClosedPass):
                if not first.ended.is_reached():
                    return
                first = encode(records.raw_of(first, time.monotonic()))
                self._told_s.append(time.monotonic())
                self._outbox[0] = first
            try:
                self._socket.send(first)
            except BlockingIOError:
                return
            self._outbox.popleft()

    def _hear(self) -> None:
        """Take what has come; ConnectionError where nothing will come any more."""
        while True:
            try:
                packet = self._socket.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            if not packet:
                raise ConnectionResetError
            self._take(from_controller(packet))

    def _take(self, message: FromController) -> None:
        if isinstance(message, Died):
            self._error = message.error
            return
        self._policy = message.policy or self._policy
        if isinstance(message, Answer):
            self._answer = message
            self._totals = message.totals
            self._verdict = message.verdict or self._verdict
            self._heat = message.heat or self._heat
            self._trace_state = message.trace_state
            self._rows.append(message.row)
            self._told_s.popleft()
            self._num_answered += 1

    def _look_after(self) -> None:
        """In a thread of its own: hand over and take in while no pass does."""
        while not self._stopping.is_set():
            self._left.wait()
            self._stopping.wait(LULL_S)
            # Cleared before it looks, so that what is submitted meanwhile sets it again.
            self._left.clear()
            self._take_turn(self._hear)
            self._take_turn(self._tell)
            if (self._outbox or self._told_s) and not self._is_closed:
                self._left.set()


def _how_it_ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
