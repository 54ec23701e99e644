"""The pass clock: a host thread that turns records into policies, and the watch over it.

The thread waits for the device, builds the record and steps the pure controller. The serving
thread only submits and asks for the policy; if the thread is dead or does not answer, the policy
is `none` from the next pass on, and the status says so.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from sglang_moelb.config import Config
from sglang_moelb.controller.controller import Controller
from sglang_moelb.controller.watchdog import is_stale
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.types import TracedPass
from sglang_moelb.types import Effects, IntArray, Lever, Observation, Policy, StepRecord

State = Literal["running", "dead", "hung"]
MAX_PENDING = 256
HANG_POLL_S = 0.05
LULL_S = 0.05  # records of a server that has nothing to do are read after this time


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A pass whose record is not built yet; `build` may wait for the device."""

    build: Callable[[], StepRecord]
    rows: Callable[[], IntArray] | None = None  # [L, R, E, M] by source rank; after `build`


class ControllerThread:
    """Owns the controller. All methods are for the serving thread."""

    def __init__(
        self,
        controller: Controller,
        config: Config,
        publish: Callable[[StepRecord, Effects], None],
        trace: BackgroundWriter | None = None,
    ) -> None:
        self._controller = controller
        self._config = config
        self._publish = publish
        self._trace = trace
        self._inbox: queue.Queue[Pending | Config | None] = queue.Queue()
        self._policy = controller.policy
        self._effects: Effects | None = None
        self._error = ""
        self.on_state: Callable[[State], None] = lambda state: None
        self.on_config: Callable[[Config], None] = lambda config: None
        self._submitted_s: deque[float] = deque(maxlen=MAX_PENDING)
        self._num_submitted = 0
        self._num_done = 0
        self._last_state: State = "running"
        self._stop = threading.Event()
        self._in_pass = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moelb-controller", daemon=True)
        self._thread.start()

    def submit(self, pending: Pending) -> None:
        """Hand over a pass; it is left out while the thread is that far behind."""
        if self._inbox.qsize() >= MAX_PENDING:
            return
        self._num_submitted += 1
        self._submitted_s.append(time.monotonic())
        self._in_pass.clear()
        self._inbox.put(pending)

    def pass_begun(self) -> None:
        """Tell the thread that the serving thread is busy launching a pass."""
        self._in_pass.set()

    def reconfigure(self, config: Config) -> None:
        """Change the configuration while running; takes effect with the next policy."""
        self._config = config
        self.on_config(config)
        self._inbox.put(config)

    def stop(self) -> None:
        """End the thread and wait for it, at most a second."""
        self._stop.set()
        self._inbox.put(None)
        self._thread.join(timeout=1.0)

    @property
    def state(self) -> State:
        """Whether the thread answers."""
        if not self._thread.is_alive():
            return "dead"
        num_unread = self._num_submitted - self._num_done
        stale = is_stale(
            num_submitted=self._num_submitted,
            num_done=self._num_done,
            oldest_unread_age_s=self._age_s(num_unread),
            timeout_s=self._config.controller.timeout_ms / 1e3,
        )
        return "hung" if stale else "running"

    def _age_s(self, num_unread: int) -> float:
        if num_unread == 0:
            return 0.0
        held = self._submitted_s
        return time.monotonic() - held[max(len(held) - num_unread, 0)]

    @property
    def trace_state(self) -> str:
        """"off", "running", or why the trace has stopped."""
        return (self._trace.stopped or "running") if self._trace else "off"

    @property
    def num_submitted(self) -> int:
        """Passes handed over since the start."""
        return self._num_submitted

    @property
    def effects(self) -> Effects | None:
        """What the last step of the controller brought about."""
        return self._effects

    def policy(self) -> Policy:
        """The policy for the next pass; `none` with the reason while nobody controls."""
        state = self.state
        if state != self._last_state:
            self._last_state = state
            self.on_state(state)
        if state == "running":
            return self._policy
        why = f"controller thread is {state}" + (f": {self._error}" if self._error else "")
        return replace(self._policy, lever=Lever.NONE, reason=why)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # Not swallowed: the thread is dead, and the status must be able to say of what.
            self._error = f"{type(error).__name__}: {error}"
            raise

    def _loop(self) -> None:
        while True:
            item = self._inbox.get()
            if item is None:
                return
            self._inject_fault()
            if isinstance(item, Config):
                self._policy = self._controller.reconfigure(item)
                if self._trace:
                    self._trace.reconfigure(item)
                continue
            # Between passes the serving thread works in Python on the critical path; during a pass
            # it mostly waits for the device. The interpreter lock is better taken then. A backlog
            # is worked off at once: until then the policy is none.
            if self._inbox.empty():
                self._in_pass.wait(timeout=LULL_S)
            record = item.build()
            now_s = time.monotonic()
            effects = self._controller.step(Observation(record=record, now_s=now_s))
            self._policy = effects.policy
            self._effects = effects
            self._publish(record, effects)
            self._num_done += 1
            if self._trace and item.rows:
                self._trace.add(
                    TracedPass(
                        record=record,
                        rows_LREM=item.rows(),
                        now_s=now_s,
                        decision=effects.decision,
                    )
                )

    def _inject_fault(self) -> None:
        if self._config.fault.controller == "die":
            raise RuntimeError("fault.controller is 'die'")
        while self._config.fault.controller == "hang" and not self._stop.is_set():
            time.sleep(HANG_POLL_S)
