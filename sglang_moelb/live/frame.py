"""View -> frame: lines that fill a terminal of any size and never more. Pure.

Below `WIDE` columns everything stands in one column, the most important first; what does not fit
is left out from the end of `_narrow`'s list of extras. From there on the map has the left column.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from sglang_moelb.live import facts
from sglang_moelb.live.chart import chart, legend
from sglang_moelb.live.lines import beside, clip, field, in_ascii, line, title
from sglang_moelb.live.view import View
from sglang_moelb.live.wire import Live, Pass

WIDE = 140
TALL = 30
AROUND_MAP = 5  # lines: title, layers, before, after, legend
RIGHT_SHARE = 0.3
MAX_RIGHT = 72
MIN_TABLE = 8
NO_PASS = (
    "no prefill pass recorded yet: send a request. Passes of decode alone are not recorded, "
    "because no lever can act in them."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How to draw: only ASCII or not, and the map before the lever or after it."""

    unicode: bool = True
    after: bool = False


def frame(view: View, width: int, height: int, look: Look | None = None) -> list[Text]:
    """The lines of a view: at most `height`, none wider than `width` cells."""
    look = look or Look()
    if width <= 0 or height <= 0:
        return []
    live = view.live
    if not live.active:
        lines = [facts.head(view, width), *facts.problem(view, width, 4)]
        lines += field("no status", live.reason, width, 6, "yellow")
    elif width >= WIDE:
        lines = _wide(view, width, height, look)
    else:
        lines = _narrow(view, width, height, look)
    lines = clip(lines, width, height)
    return lines if look.unicode else [in_ascii(text) for text in lines]


def _narrow(view: View, width: int, height: int, look: Look) -> list[Text]:
    live, tall = view.live, height >= TALL
    top = [facts.head(view, width), *facts.problem(view, width, 2)]
    top += [*facts.mode(live, width), *facts.why(live, width, 3 if tall else 1)]
    below = [*facts.quality(live, width), *facts.own_time(live, width)]
    below += facts.memory(live, width, 3 if tall else 1)
    below += facts.verdict(live, width, 4 if tall else 2)
    if live.last is None:
        return [*top, *below, line(), *field("no pass", NO_PASS, width, 4, "yellow")]
    below.append(title("last decisions", width))
    below += facts.decisions(live.decisions, width, 5 if tall else 2)
    trend = facts.imbalance(live.history, width) if live.history else []
    room = height - len(top) - len(below) - AROUND_MAP - (len(trend) if tall else 0)
    lines = [*top, *_map(live, live.last, width, room, look), *below, *trend]
    if live.history:
        lines.append(title("last passes", width))
        lines += facts.passes(live.history, max(height - len(lines), 0))
    return lines


def _wide(view: View, width: int, height: int, look: Look) -> list[Text]:
    live = view.live
    right_width = min(int(width * RIGHT_SHARE), MAX_RIGHT)
    left_width = width - right_width - 3
    top = [facts.head(view, width), *facts.problem(view, width, 3), *facts.mode(live, width)]
    room = height - len(top)
    right = [title("policy", right_width), *facts.why(live, right_width, 5)]
    right += facts.levers(live, right_width)
    right += facts.verdict(live, right_width, 6)
    right += [line(), title("cost", right_width)]
    right += [*facts.quality(live, right_width), *facts.own_time(live, right_width)]
    right += facts.memory(live, right_width, 4)
    right += [line(), title("last decisions", right_width)]
    if live.last is None:
        left = [title("load", left_width), *field("no pass", NO_PASS, left_width, 4, "yellow")]
    else:
        left = _map(live, live.last, left_width, room - AROUND_MAP, look)
    if live.history is None:
        return [*top, *beside(left, left_width, right)]
    below = [line(), title("last passes", left_width), *facts.passes(live.history, room)]
    table_left = room - len(left) >= MIN_TABLE
    rest = room - len(right) - (4 if table_left else 3 + MIN_TABLE)
    right += facts.decisions(live.decisions, right_width, max(rest, 1), each=3)
    right += [line(), *facts.imbalance(live.history, right_width)]
    if table_left:
        left += below
    else:
        right += below
    return [*top, *beside(left[:room], left_width, right[:room])]


def _map(live: Live, shown: Pass, width: int, max_rows: int, look: Look) -> list[Text]:
    """The heat map under its title, with the legend."""
    lines = chart(shown, live.heat, width, max_rows, after=look.after)
    return [title(facts.shown_pass(shown), width), *lines, legend(width)]
