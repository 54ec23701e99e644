"""Lines of styled text that fit: the bricks of the terminal view.

Every character drawn by us is one cell wide, and colours are the terminal's own sixteen, so that
they suit its theme and cost few bytes over a slow link. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

LABEL = "dim"
GOOD, WARN, BAD = "green", "yellow", "bold red"
EIGHTHS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"
ELLIPSIS = "…"
# One for one, so that spans of styles stay where they are.
ASCII = str.maketrans(
    {
        "░": "-",
        "▒": "=",
        "▓": "+",
        "█": "#",
        "·": ".",
        "●": "*",
        "○": "o",
        "─": "-",
        "│": "|",
        "→": ">",
        "…": "~",
        **dict(zip("▏▎▍▌", "    ", strict=True)),
        **dict(zip("▋▊▉", "###", strict=True)),
        **dict(zip("▁▂▃▄▅▆▇", "_..-=+*", strict=True)),
    }
)


def line(*parts: str | tuple[str, str]) -> Text:
    """A line of parts, each a text or a text and its style."""
    return Text.assemble(*parts, no_wrap=True, overflow="crop", end="")


def clean(text: str) -> str:
    """Text from a server on one line, without what could steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def fitted(text: Text, width: int) -> Text:
    """`text` as exactly `width` cells: padded, or cut with an ellipsis."""
    result = text.copy()
    if result.cell_len > width:
        result.plain = set_cell_size(result.plain, width - 1) + ELLIPSIS if width else ""
    if result.cell_len < width:
        result.append(" " * (width - result.cell_len))
    return result


def beside(left: Sequence[Text], width: int, right: Sequence[Text], gap: int = 3) -> list[Text]:
    """Two columns; the left one `width` cells wide."""
    blank = line()
    height = max(len(left), len(right))
    rows = zip(_padded(left, height, blank), _padded(right, height, blank), strict=True)
    return [line().append_text(fitted(a, width)).append(" " * gap).append_text(b) for a, b in rows]


def _padded(lines: Sequence[Text], height: int, blank: Text) -> list[Text]:
    return [*lines, *[blank] * (height - len(lines))]


def title(text: str, width: int, note: str = "") -> Text:
    """A heading with a rule up to `width`."""
    head = line("─ ", (text, "bold"), " ")
    if note:
        head.append(f"({note}) ", LABEL)
    head.append("─" * max(width - head.cell_len, 0), LABEL)
    return fitted(head, width)


def wrapped(text: str, width: int, max_lines: int) -> list[str]:
    """`text` broken at spaces into at most `max_lines`; the last ends with … if more follows."""
    if width <= 0 or max_lines <= 0:
        return []
    rows: list[str] = []
    row = ""
    for word in clean(text).split():
        for piece in _pieces(word, width):
            joined = f"{row} {piece}" if row else piece
            if cell_len(joined) <= width:
                row = joined
                continue
            rows.append(row)
            row = piece
    rows.append(row)
    if len(rows) > max_lines:
        last = rows[max_lines - 1]
        last = last if cell_len(last) < width else set_cell_size(last, width - 1)
        rows = [*rows[: max_lines - 1], last + ELLIPSIS]
    return rows


def _pieces(word: str, width: int) -> Iterable[str]:
    while cell_len(word) > width:
        head = word[:width]
        while len(head) > 1 and cell_len(head) > width:
            head = head[:-1]
        yield head
        word = word[len(head) :]
    yield word


def field(label: str, text: str, width: int, max_lines: int = 1, style: str = "") -> list[Text]:
    """A label in a column of ten cells and a text beside it."""
    rows = wrapped(text, width - LABEL_WIDTH, max_lines) or [""]
    heads = [label, *[""] * (len(rows) - 1)]
    return [
        line((f"{head:<{LABEL_WIDTH}}", LABEL), (row, style))
        for head, row in zip(heads, rows, strict=True)
    ]


LABEL_WIDTH = 10


def bar(share: float, width: int) -> str:
    """A bar of `share` of `width` cells, to an eighth of a cell, at most all of it."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def spark(values: Sequence[float], low: float, high: float) -> str:
    """A character a value, from `low` to `high`."""
    span = max(high - low, 1e-9)
    steps = (min(max((value - low) / span, 0.0), 1.0) for value in values)
    return "".join(SPARKS[round(step * (len(SPARKS) - 1))] for step in steps)


def in_ascii(text: Text) -> Text:
    """The same line for a terminal that knows only ASCII."""
    result = text.copy()
    plain = result.plain.translate(ASCII)
    result.plain = "".join(c if c.isascii() else "?" * cell_len(c) for c in plain)
    return result


def clip(lines: Iterable[Text], width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` cells, without spaces at their ends."""
    result = []
    for text, _ in zip(lines, range(height), strict=False):
        cut = fitted(text, width) if text.cell_len > width else text.copy()
        cut.rstrip()
        result.append(cut)
    return result
