"""The page in headless Chromium, and what can be told of it without."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from sglang_moelb.live.heat import EDGES
from sglang_moelb.live.wire import AGE_HEADER, VERSION, Live
from sglang_moelb.types import Lever

from .fake_server import Serving, app_of
from .statuses import REASONS, status

PAGE = files("sglang_moelb.live").joinpath("page.html").read_text(encoding="utf-8")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install -y chromium"
)
STRICT = "default-src 'self' 'unsafe-inline'"


def test_the_page_loads_nothing_from_elsewhere_and_puts_no_text_into_markup() -> None:
    assert re.findall(r"https?://|//[a-z]", PAGE.replace("// ", "")) == []
    assert re.findall(r"@import|url\(|<link|<img|<iframe|\bsrc=|\beval\b|new Function", PAGE) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", PAGE) == []
    assert PAGE.count("fetch(") == 1
    assert 'fetch("live"' in PAGE, "relative, so that it works behind a proxy's prefix"


def test_page_and_server_agree_on_names_levels_and_version() -> None:
    defaults = re.search(r"DEFAULTS = \{(.*?)\};", PAGE, re.DOTALL)
    assert defaults is not None
    names = set(re.findall(r"(\w+):", defaults[1]))
    fields = {field.name for field in msgspec.structs.fields(Live)}
    assert names <= fields
    used = set(re.findall(r"\b(?:data|d)\.(\w+)", PAGE)) - {"moelb_live"}
    assert used & fields <= names, "a field that is left out of an answer needs a default"
    assert used <= fields
    edges = re.search(r"EDGES = \[(.*?)\]", PAGE)
    assert edges is not None
    assert tuple(float(edge) for edge in edges[1].split(",")) == EDGES
    assert f"VERSION = {VERSION};" in PAGE
    assert AGE_HEADER in PAGE
    for palette in ("LIGHT", "DARK"):
        colours = re.search(rf"{palette} = \[(.*?)\]", PAGE, re.DOTALL)
        assert colours is not None
        assert len(colours[1].split(",")) == len(EDGES) + 1


def dom_of(url: str, folder: Path, *, width: int = 1200, budget_ms: int = 4000) -> str:
    """The text of the page after `budget_ms`, as Chromium has it."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={folder}", f"--window-size={width},900",
            f"--virtual-time-budget={budget_ms}", "--dump-dom", "--enable-logging=stderr", url,
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    problems = [line for line in console if "Failed to load resource" not in line]
    assert problems == [], problems
    body = done.stdout.partition("<body>")[2].partition("<script>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body.replace("&nbsp;", " ")).split())


@in_chromium
@pytest.mark.parametrize(
    ("num_ranks", "num_layers", "width"), [(2, 4, 1200), (64, 96, 1200), (256, 96, 400)]
)
def test_the_page_shows_a_server(
    tmp_path: Path, num_ranks: int, num_layers: int, width: int
) -> None:
    served = status(num_ranks=num_ranks, num_layers=num_layers)
    with Serving(app_of(lambda: served)) as server:
        text = dom_of(f"{server.url}/moelb/", tmp_path, width=width)
    assert f"{num_ranks} ranks x {num_layers} MoE layers" in text
    assert re.search(r"live, \d\.\d s old", text)
    assert REASONS[Lever.EXPAND] in text
    assert "running" in text
    assert "1.20 %" in text
    assert "staging 1.21 GB" in text
    assert "turn on drop" in text
    assert "Pass 621" in text


@in_chromium
def test_the_page_draws_under_a_strict_policy_of_a_proxy(tmp_path: Path) -> None:
    served = status()
    app = app_of(lambda: served)

    @app.middleware("http")
    async def add_policy(request: Any, call_next: Any) -> Response:
        answer: Response = await call_next(request)
        answer.headers["Content-Security-Policy"] = STRICT
        return answer

    with Serving(app) as server:
        assert "live," in dom_of(f"{server.url}/moelb/", tmp_path)


@in_chromium
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_passes": 0}, "No prefill pass recorded yet"),
        ({"state": "dead"}, "the server serves in mode none"),
        ({"num_ranks": 4, "idle_rank": True}, "1 rank without tokens"),
        ({"spent_share": 0.06, "extras": False}, "6.00 %"),
    ],
)
def test_the_page_shows_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    served = status(**changes)
    with Serving(app_of(lambda: served)) as server:
        assert expected in dom_of(f"{server.url}/moelb/", tmp_path)


@in_chromium
def test_text_of_the_server_stays_text(tmp_path: Path) -> None:
    served = status()
    served["policy"]["reason"] = "<img src=x onerror=\"document.title='x'\"> & <b>bold</b>"
    with Serving(app_of(lambda: served)) as server:
        text = dom_of(f"{server.url}/moelb/", tmp_path)
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


@in_chromium
def test_a_server_that_goes_away_leaves_stale_numbers_with_their_age(tmp_path: Path) -> None:
    served, turns = status(), itertools.count()

    def read() -> dict[str, Any]:
        if next(turns):
            server.ask_to_stop()
        return served

    with Serving(app_of(read)) as server:
        text = dom_of(f"{server.url}/moelb/", tmp_path, budget_ms=12_000)
    assert re.search(r"stale since \d", text)
    assert "the server cannot be reached; next try in" in text
    assert REASONS[Lever.EXPAND] in text, "the last numbers stay"


@in_chromium
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda: JSONResponse({}, 404), "the server runs without the plugin"),
        (lambda: JSONResponse({}, 401), "the server needs a key (HTTP 401)"),
        (lambda: JSONResponse({}, 500), "HTTP 500; see the server"),
        (lambda: Response("<p>hello"), "the answer is not JSON"),
        (lambda: JSONResponse({"status": "ok"}), "the answer is not a live view"),
        (lambda: JSONResponse({"moelb_live": 99}), "the server is newer than this page"),
    ],
    ids=["no plugin", "key", "broken", "not JSON", "other JSON", "newer"],
)
def test_an_answer_that_is_no_live_view_is_named(
    tmp_path: Path, answer: Any, expected: str
) -> None:
    app = FastAPI()
    page = Response(PAGE, media_type="text/html")
    app.add_api_route("/moelb/", lambda: page, response_model=None)
    app.add_api_route("/moelb/live", answer, response_model=None)
    with Serving(app) as server:
        text = dom_of(f"{server.url}/moelb/", tmp_path)
    assert "no answer" in text
    assert expected in text
