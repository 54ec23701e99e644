"""What there is to draw: the last answer, how old it is, and what stands in the way of the next."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moelb.live.wire import Live


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The state of one moment; all ages in seconds.

    `age_s` is that of the numbers in `live`. `problem` is "" or why the last question failed, and
    `retry_s` is then the time to the next. `quiet_s` is how long no pass has been seen to begin.
    """

    url: str
    live: Live
    age_s: float
    problem: str = ""
    retry_s: float = 0.0
    quiet_s: float = 0.0
