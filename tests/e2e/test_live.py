"""The live view of a server under load: the compact answer, the page and `moelb top`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_moelb.live.client import LiveClient
from sglang_moelb.live.frame import frame
from sglang_moelb.live.view import View

from .conftest import Serve
from .talk import NUM_LAYERS, NUM_RANKS, TEXT, call, change, observed, say, status, until

pytestmark = pytest.mark.e2e


def test_the_live_view_shows_what_the_status_has(serve: Serve) -> None:
    server = observed(serve)
    change(server, {"mode": "drop", "capacity": {"factor": 0.5}})
    say(server, TEXT)

    with LiveClient(server.url, None, 20.0) as client:

        def cut_is_shown() -> bool:
            last = client.fetch().live.last
            return last is not None and last.lever == "drop"

        until(cut_is_shown)
        live = client.fetch().live
    full = status(server)
    last = live.last
    assert last is not None
    recorded = next(one for one in full["recent"] if one["step"] == last.step)
    assert last.rows_before_R == recorded["rows_before_R"]
    assert sum(last.rows_after_R) < sum(last.rows_before_R)
    assert live.heat is not None
    assert (live.heat.num_rows, live.heat.num_columns) == (NUM_RANKS, NUM_LAYERS)
    assert live.heat.after not in ("", live.heat.before)
    assert live.spent_share is not None
    assert live.spent_share > 0
    assert live.mode == full["mode"] == "drop"
    text = "\n".join(row.plain for row in frame(View(url=server.url, live=live, age_s=0.0), 80, 24))
    assert "mode      drop  lever drop  controller running" in text
    assert text.count("\nr0 ") == text.count("\nr1 ") == 1
    code, page = call(server, "/moelb/")
    assert code == 200
    assert page.startswith("<!doctype html>")


def test_many_viewers_leave_the_answers_as_they_are(serve: Serve) -> None:
    server = observed(serve)
    said, ended = say(server, TEXT), threading.Event()

    def watch() -> int:
        num_seen = 0
        while not ended.is_set():
            code, answer = call(server, "/moelb/live")
            assert code == 200
            assert answer["moelb_live"] == 1
            num_seen += 1
        return num_seen

    with ThreadPoolExecutor(4) as pool:
        watchers = [pool.submit(watch) for _ in range(4)]
        try:
            assert say(server, TEXT) == said
        finally:
            ended.set()
        assert all(watcher.result() > 0 for watcher in watchers)
    assert status(server)["controller"]["state"] == "running"
