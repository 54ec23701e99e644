"""Laws of the terminal view: it fits any size, and says what matters without colours too."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from sglang_moelb.live.answer import live_of
from sglang_moelb.live.chart import CELLS, chart
from sglang_moelb.live.frame import Look, frame
from sglang_moelb.live.heat import EDGES
from sglang_moelb.live.view import View
from sglang_moelb.live.wire import Live
from sglang_moelb.types import Lever

from .statuses import REASONS, status

URL = "http://10.0.0.3:30000"
SIZES = [(80, 24), (200, 60)]
STATUSES: dict[str, dict[str, Any]] = {
    "small": {},
    "large": {"num_ranks": 64, "num_layers": 96},
    "rank without tokens": {"num_ranks": 4, "num_layers": 8, "idle_rank": True},
    "no pass yet": {"num_passes": 0},
    "dead": {"state": "dead"},
    "hung": {"state": "hung"},
    "budget spent": {"spent_share": 0.06},
    "bare": {"extras": False},
}


@cache
def live(name: str) -> Live:
    return live_of(status(**STATUSES[name]))


def view(name: str, **changes: Any) -> View:
    return replace(View(url=URL, live=live(name), age_s=0.3), **changes)


def printed(lines: list[Text], width: int, height: int) -> list[str]:
    """What a console of that size shows of a frame."""
    console = Console(
        record=True, width=width, height=height, file=io.StringIO(), force_terminal=True
    )
    console.print(Text("\n").join(lines), soft_wrap=True)
    return console.export_text().removesuffix("\n").split("\n")


def text_of(shown: View, width: int, height: int, look: Look | None = None) -> str:
    lines = frame(shown, width, height, look)
    rows = printed(lines, width, height)
    assert len(rows) == len(lines) <= height
    assert max(Text(row).cell_len for row in rows) <= width
    return "\n".join(rows)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("name", STATUSES)
def test_a_frame_fits_and_has_the_essentials(name: str, width: int, height: int) -> None:
    text = text_of(view(name), width, height)
    assert URL in text
    assert "live, 0.3 s old" in text
    assert "mode      auto" in text
    assert "controller" in text
    assert "quality" in text
    if live(name).memory:
        assert "staging 1.21 GB" in text
        assert "kv tokens lost 12,345" in " ".join(text.split())
        assert "turn on drop" in text
    if live(name).last:
        assert "max/mean" in text or "mean 1." in text
        assert "last decisions" in text
        assert REASONS[Lever.EXPAND][:30] in text
        assert "own time" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_large_clusters_are_aggregated_until_they_fit(width: int, height: int) -> None:
    rows = text_of(view("large"), width, height).split("\n")
    ranks = [row.split()[0] for row in rows if row.startswith("r")]
    assert ranks[0].startswith("r0-")
    assert ranks[-1].endswith("-63"), "every rank is in a row"
    assert len(ranks) >= 7
    assert any(row.startswith("before") for row in rows)
    assert any(row.startswith("after") for row in rows)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_rank_without_tokens_is_named(width: int, height: int) -> None:
    text = text_of(view("rank without tokens"), width, height)
    assert text.count("no tokens") == 1
    assert "no tokens" not in text_of(view("small"), width, height)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_before_the_first_pass_the_view_says_what_to_do(width: int, height: int) -> None:
    text = " ".join(text_of(view("no pass yet"), width, height).split())
    assert "no prefill pass recorded yet" in text
    assert "nothing lost yet" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("state", ["dead", "hung"])
def test_a_controller_that_does_not_answer_stands_out(state: str, width: int, height: int) -> None:
    lines = frame(view(state), width, height)
    assert f"{state.upper()}, serving in none" in text_of(view(state), width, height)
    bad = [line for line in lines if any("red" in str(span.style) for span in line.spans)]
    assert any(state.upper() in line.plain for line in bad)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_server_that_went_away_leaves_its_last_numbers_with_their_age(
    width: int, height: int
) -> None:
    gone = view("small", age_s=33.0, problem=f"{URL} cannot be reached", retry_s=4.0)
    text = text_of(gone, width, height)
    assert "STALE 33 s, next try in 4 s" in text
    assert "cannot be reached" in text
    assert "controller running" in text, "the last numbers stay"
    assert "STALE" not in text_of(view("small"), width, height)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_silent_schedulers_and_a_quiet_server_are_told_apart(width: int, height: int) -> None:
    silent = text_of(view("small", age_s=70.0), width, height)
    assert "the schedulers are silent: 70 s old" in silent
    quiet = text_of(view("small", quiet_s=40.0), width, height)
    assert "live, 0.3 s old; no pass for 40 s" in quiet


def test_a_server_without_a_controller_says_why() -> None:
    inactive = View(
        url=URL, live=live_of({"active": False, "reason": "no rank answers"}), age_s=0.0
    )
    for width, height in SIZES:
        assert "no rank answers" in text_of(inactive, width, height)


@given(
    st.sampled_from(sorted(STATUSES)),
    st.integers(1, 260),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_every_size_fits(
    name: str, width: int, height: int, stale: bool, unicode: bool, after: bool
) -> None:
    problem = "the server cannot be reached, which is a long story " * 4
    shown = view(name, problem=problem, age_s=9e5) if stale else view(name)
    text = text_of(shown, width, height, Look(unicode=unicode, after=after))
    assert unicode or text.isascii()


@given(st.integers(1, 140), st.integers(1, 130), st.integers(1, 220), st.integers(1, 70))
@settings(max_examples=60)
def test_every_topology_fits(num_ranks: int, num_layers: int, width: int, height: int) -> None:
    small = live_of(status(num_ranks=num_ranks, num_layers=num_layers, num_passes=2))
    text_of(View(url=URL, live=small, age_s=0.0), width, height)


def test_without_a_map_the_bars_and_layers_are_drawn_all_the_same() -> None:
    full = status(num_ranks=4)
    del full["heat"]
    text = text_of(View(url=URL, live=live_of(full), age_s=0.0), 80, 24)
    assert len([row for row in text.split("\n") if row.startswith("r")]) == 4
    assert "mean 1." in text


def test_hot_and_cold_read_without_colours() -> None:
    """Rank 1 of 2 has three quarters of the rows in layer 0, and an even share in layer 1."""
    full = status(num_ranks=2, num_layers=2, num_passes=1)
    full["heat"].update(before="3797", after="")
    shown = live_of(full)
    assert shown.last is not None
    rows = [line.plain for line in chart(shown.last, shown.heat, 80, 9)]
    cold, hot = (row[7:23] for row in rows if row.startswith("r"))
    assert set(cold[:7]) == {"░"}
    assert set(hot[:7]) == {"▓"}
    assert set(cold[8:15]) == set(hot[8:15]) == {"▒"}


def test_the_map_can_be_shown_before_and_after_the_lever() -> None:
    before = text_of(view("large"), 200, 60)
    after = text_of(view("large"), 200, 60, Look(after=True))
    assert "before (a: after)" in before
    assert "after (b: before)" in after
    row = next(i for i, text in enumerate(before.split("\n")) if text.startswith("r0-"))
    assert before.split("\n")[row] != after.split("\n")[row]


def test_every_level_has_a_character_and_hotter_ones_look_hotter() -> None:
    assert len(CELLS) == len(EDGES) + 1
    ramp = list(dict.fromkeys(char for char, _ in CELLS))
    assert ramp == [" ", "·", "░", "▒", "▓", "█", "2", "3", "4"]


def test_what_a_server_sends_cannot_steer_the_terminal() -> None:
    full = status()
    full["policy"]["reason"] = "evil \x1b[2J\x1b]0;title\x07 \r\n text [bold]markup[/bold]"
    shown = View(url=URL, live=live_of(full), age_s=0.0)
    for width, height in SIZES:
        text = text_of(shown, width, height)
        assert "\x1b" not in "".join(line.plain for line in frame(shown, width, height))
        assert "[bold]markup[/bold]" in text


def test_wide_characters_are_counted_as_two_cells() -> None:
    full = status()
    full["policy"]["reason"] = "均衡" * 150
    for width in (79, 80, 81, 141):
        text_of(View(url=URL, live=live_of(full), age_s=0.0), width, 24)
