"""The terminal: frames on it twice a second, keys from it, and the end."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

from rich.console import Console
from rich.live import Live as Screen
from rich.text import Text

from sglang_moelb.live.frame import Look, frame
from sglang_moelb.live.view import View

TICK_S = 0.5
KEY_AFTER, KEY_BEFORE, KEY_END = "a", "b", "q"


def picture(view: View, console: Console, look: Look) -> Text:
    """One frame of the console's size."""
    width, height = console.size
    return Text("\n", no_wrap=True, overflow="crop").join(frame(view, width, height, look))


def look_of(console: Console) -> Look:
    """ASCII alone where the terminal's encoding has no more."""
    return Look(unicode=console.encoding.lower().startswith("utf"))


def show(view: Callable[[], View], console: Console, tick_s: float) -> None:
    """Draw `view()` until q, Ctrl-C or SIGTERM; the terminal is as before afterwards.

    A frame that equals the last one is not sent.
    """
    look = look_of(console)
    shown: tuple[Text, tuple[int, int]] | None = None
    with (
        _signals() as is_ended,
        _keys() as key,
        Screen(console=console, screen=True, auto_refresh=False) as screen,
    ):
        while not is_ended():
            drawn = picture(view(), console, look)
            if shown != (drawn, console.size):
                screen.update(drawn, refresh=True)
                shown = (drawn, console.size)
            pressed = key(tick_s)
            if pressed == KEY_END:
                return
            if pressed in (KEY_AFTER, KEY_BEFORE):
                look = replace(look, after=pressed == KEY_AFTER)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come: they end the view between two frames.

    An exception raised wherever the program happens to be could be lost, as in a destructor.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for a key, at most so many seconds, and returns it or ""."""
    if not sys.stdin.isatty() or find_spec("termios") is None:
        yield _no_keys
        return
    import termios  # not on every system
    import tty

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    tty.setcbreak(file)
    try:
        yield _read_key
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _no_keys(timeout_s: float) -> str:
    time.sleep(timeout_s)
    return ""


def _read_key(timeout_s: float) -> str:
    file = sys.stdin.fileno()
    ready, _, _ = select.select([file], [], [], timeout_s)
    if not ready:
        return ""
    # Not sys.stdin.read: it would take further keys into a buffer, which select does not see. At
    # the end of the input nothing can be typed any more, and select would not wait.
    return os.read(file, 1).decode(errors="replace").lower() or KEY_END
