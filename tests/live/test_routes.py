"""Laws of `GET /moelb/live` and of the page: many viewers cost the schedulers one question."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from sglang_moelb.ep.live_routes import LiveAnswers
from sglang_moelb.live.wire import AGE_HEADER, decode

from .fake_server import Serving, app_of
from .statuses import status

STATUS = status()


class Schedulers:
    """Counts questions, and answers when allowed to."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.now_s = 0.0

    async def read(self) -> dict[str, Any]:
        self.num_asked += 1
        await self.answering.wait()
        return STATUS

    def answers(self) -> LiveAnswers:
        return LiveAnswers(self.read, lambda: self.now_s, wait_s=0.02)


def test_many_viewers_at_once_cost_one_question() -> None:
    async def run() -> int:
        schedulers = Schedulers()
        answers = schedulers.answers()
        found = await asyncio.gather(*(answers.get() for _ in range(100)))
        assert len({answer.plain for answer, _ in found}) == 1
        return schedulers.num_asked

    assert asyncio.run(run()) == 1


def test_an_answer_is_kept_for_a_quarter_of_a_second_and_not_longer() -> None:
    async def run() -> list[int]:
        schedulers = Schedulers()
        answers = schedulers.answers()
        asked = []
        for now_s in (0.0, 0.24, 0.25, 0.49, 9.0):
            schedulers.now_s = now_s
            await answers.get()
            asked.append(schedulers.num_asked)
        return asked

    assert asyncio.run(run()) == [1, 1, 2, 2, 3]


def test_schedulers_that_hang_leave_the_last_answer_with_its_age_and_one_question() -> None:
    async def run() -> None:
        schedulers = Schedulers()
        answers = schedulers.answers()
        await answers.get()
        schedulers.answering.clear()
        schedulers.now_s = 5.0
        for _ in range(3):
            answer, age_ms = await answers.get()
            assert decode(answer.plain).mode == "auto"
            assert age_ms == 5000
        assert schedulers.num_asked == 2, "no question is put on top of one that hangs"
        schedulers.answering.set()
        await asyncio.sleep(0.01)
        assert (await answers.get())[1] == 0

    asyncio.run(run())


def test_before_the_first_answer_the_view_says_what_it_waits_for() -> None:
    async def run() -> None:
        schedulers = Schedulers()
        schedulers.answering.clear()
        answers = schedulers.answers()
        live = decode((await answers.get())[0].plain)
        assert not live.active
        assert "have not answered" in live.reason
        schedulers.answering.set()
        await asyncio.sleep(0.01)
        assert decode((await answers.get())[0].plain).active

    asyncio.run(run())


def test_a_status_that_cannot_be_read_is_an_error_and_the_next_one_is_asked_for() -> None:
    async def run() -> None:
        turns = iter([RuntimeError("broken"), STATUS])

        async def read() -> dict[str, Any]:
            turn = next(turns)
            if isinstance(turn, RuntimeError):
                raise turn
            return turn

        answers = LiveAnswers(read)
        with pytest.raises(RuntimeError, match="broken"):
            await answers.get()
        assert decode((await answers.get())[0].plain).active

    asyncio.run(run())


def test_the_answer_is_compressed_for_those_who_take_that() -> None:
    with Serving(app_of(lambda: STATUS)) as server:
        url = f"{server.url}/moelb/live"
        packed = httpx.get(url, headers={"Accept-Encoding": "gzip"})
        plain = httpx.get(url, headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert json.loads(plain.content)["mode"] == "auto"
    for answer in (packed, plain):
        assert answer.headers["cache-control"] == "no-store"
        assert int(answer.headers[AGE_HEADER]) >= 0


def test_the_page_allows_nothing_from_elsewhere() -> None:
    with Serving(app_of(lambda: STATUS)) as server:
        page = httpx.get(f"{server.url}/moelb/")
        moved = httpx.get(f"{server.url}/moelb", follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert moved.text == page.text
