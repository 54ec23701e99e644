"""Laws of asking again and again: never two questions at once, later and later after failures."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import msgspec

from sglang_moelb.live.answer import live_of
from sglang_moelb.live.client import Fetched, LiveClient, LiveError
from sglang_moelb.live.poller import MAX_WAIT_S, Poller, Watch

from .fake_server import Serving, app_of
from .statuses import status

LIVE = live_of(status())
FIRST = Fetched(live=LIVE, age_s=0.25)


def watch() -> Watch:
    return Watch("http://x", FIRST, now_s=100.0)


def later(num_passes: int) -> Fetched:
    return replace(FIRST, live=msgspec.structs.replace(LIVE, num_passes=num_passes), age_s=0.0)


def test_the_age_is_the_servers_and_the_time_since() -> None:
    assert watch().view(101.0).age_s == 1.25
    assert watch().view(101.0).problem == ""


def test_a_failure_keeps_the_numbers_and_their_age_grows() -> None:
    watched = watch()
    watched.fail(LiveError("gone"))
    watched.wait_s(0.5, 0.0, 102.0)
    view = watched.view(102.5)
    assert (view.live, view.problem) == (LIVE, "gone")
    assert view.age_s == 2.75
    assert view.retry_s == 0.5
    watched.take(later(LIVE.num_passes), 103.0)
    assert watched.view(103.0).problem == ""
    assert watched.view(103.0).age_s == 0.0


def test_questions_come_every_interval_and_more_seldom_after_failures() -> None:
    watched = watch()
    assert watched.wait_s(0.5, took_s=0.1, now_s=0.0) == 0.4
    assert watched.wait_s(0.5, took_s=3.0, now_s=0.0) == 0.0, "a slow link is not asked twice"
    waits = []
    for _ in range(8):
        watched.fail(LiveError("gone"))
        waits.append(watched.wait_s(0.5, took_s=5.0, now_s=0.0))
    assert waits == [1.0, 2.0, 4.0, *[MAX_WAIT_S] * 5]
    watched.take(FIRST, 0.0)
    assert watched.wait_s(0.5, took_s=0.0, now_s=0.0) == 0.5
    watched.fail(LiveError("gone"))
    assert watched.wait_s(60.0, took_s=0.0, now_s=0.0) == 60.0


def test_quiet_is_the_time_since_a_pass_was_seen_to_begin() -> None:
    watched = watch()
    watched.take(later(LIVE.num_passes), 110.0)
    assert watched.view(110.0).quiet_s == 10.0
    watched.take(later(LIVE.num_passes + 1), 120.0)
    assert watched.view(121.0).quiet_s == 1.0


def test_one_question_is_under_way_at_a_time_however_slow_the_link() -> None:
    under_way, most, asked = 0, 0, threading.Event()

    def fetch() -> Fetched:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.05)
        under_way -= 1
        asked.set()
        return FIRST

    poller = Poller(fetch, watch(), 0.001)
    poller.start()
    assert asked.wait(5.0)
    time.sleep(0.2)
    poller.stop()
    assert most == 1


def test_a_server_that_stops_mid_run_is_reported_and_its_numbers_stay() -> None:
    served: dict[str, Any] = status()
    with Serving(app_of(lambda: served)) as server, LiveClient(server.url, None, 2.0) as client:
        poller = Poller(client.fetch, Watch(server.url, client.fetch(), time.monotonic()), 0.05)
        poller.start()
        time.sleep(0.2)
        assert poller.view().problem == ""
        server.stop()
        until_s = time.monotonic() + 20.0
        # A question that is under way when the server stops is broken off, which is told as such.
        while "cannot be reached" not in poller.view().problem:
            assert time.monotonic() < until_s, "the failure was never told"
            time.sleep(0.02)
        view = poller.view()
        poller.stop()
    assert view.live.mode == "auto"
    assert view.age_s > 0.0
