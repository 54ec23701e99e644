"""A thread that asks the server again and again: one question at a time, later after failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sglang_moelb.live.client import Fetched, LiveError
from sglang_moelb.live.view import View
from sglang_moelb.live.wire import Live

MAX_WAIT_S = 8.0
STOP_S = 0.2


class Watch:
    """Turns answers and failures into views. Pure: times are arguments."""

    def __init__(self, url: str, first: Fetched, now_s: float) -> None:
        self._url = url
        self._live: Live = first.live
        self._made_s = now_s - first.age_s
        self._grew_s = now_s
        self._problem = ""
        self._num_failures = 0
        self._next_s = now_s

    def take(self, fetched: Fetched, now_s: float) -> None:
        """Note an answer."""
        if fetched.live.num_passes != self._live.num_passes:
            self._grew_s = now_s
        self._live = fetched.live
        self._made_s = now_s - fetched.age_s
        self._problem, self._num_failures = "", 0

    def fail(self, error: LiveError) -> None:
        """Note a question without an answer."""
        self._problem = str(error)
        self._num_failures += 1

    def wait_s(self, interval_s: float, took_s: float, now_s: float) -> float:
        """Time to the next question: the rest of the interval, or more after each failure."""
        wait_s = max(interval_s - took_s, 0.0)
        if self._num_failures:
            wait_s = min(interval_s * 2.0**self._num_failures, max(MAX_WAIT_S, interval_s))
        self._next_s = now_s + wait_s
        return wait_s

    def view(self, now_s: float) -> View:
        """The state at `now_s`."""
        return View(
            url=self._url,
            live=self._live,
            age_s=max(now_s - self._made_s, 0.0),
            problem=self._problem,
            retry_s=max(self._next_s - now_s, 0.0),
            quiet_s=max(now_s - self._grew_s, 0.0),
        )


class Poller:
    """Runs `fetch` every `interval_s` in a thread of its own, from `start` to `stop`."""

    def __init__(self, fetch: Callable[[], Fetched], watch: Watch, interval_s: float) -> None:
        self._fetch = fetch
        self._watch = watch
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moelb-top", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question that is under way is waited for only shortly."""
        self._stop.set()
        self._thread.join(timeout=STOP_S)

    def view(self) -> View:
        """The newest state."""
        with self._lock:
            return self._watch.view(time.monotonic())

    def _run(self) -> None:
        wait_s = self._interval_s
        while not self._stop.wait(wait_s):
            begun_s = time.monotonic()
            failure, fetched = None, None
            try:
                fetched = self._fetch()
            except LiveError as error:
                failure = error
            now_s = time.monotonic()
            with self._lock:
                if fetched:
                    self._watch.take(fetched, now_s)
                if failure:
                    self._watch.fail(failure)
                wait_s = self._watch.wait_s(self._interval_s, now_s - begun_s, now_s)
