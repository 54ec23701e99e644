"""The scripts of `launch/` started for real, on CPU, each once.

The prefill role needs Mooncake: see test_disaggregated.py.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.ab.server import pick_port, serve

from .commands import LAUNCH

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(540)]  # two starts in one test

READY_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 60.0
RECIPE = "tiny-text_cpu"
TEXT = "What is 1234 + 5678?"


@contextmanager
def started(script: str, folder: Path) -> Iterator[str]:
    """Run a script as a user would; yields the server's address."""
    port = pick_port(None)
    command = ["env", f"PYTHON={sys.executable}", f"MODEL={folder / 'model'}"]
    command += ["bash", str(LAUNCH / f"{script}.sh"), RECIPE]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = folder / f"{script}.log"
    with serve(command, port=port, log=log, timeout_s=READY_TIMEOUT_S) as server:
        yield server.url


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of a body; the JSON of the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        return json.load(response)


def generate(url: str, **more: Any) -> str:
    """Greedy text for a prompt that is below the recipe's gate for small batches."""
    body = {"text": TEXT, "sampling_params": {"temperature": 0, "max_new_tokens": 8}, **more}
    return str(ask(f"{url}/generate", body)["text"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.mark.slow
def test_stock_and_balanced_servers_start_from_their_scripts_and_agree(folder: Path) -> None:
    with started("serve_stock", folder) as url:
        stock = generate(url)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(f"{url}/moelb/status")
    with started("serve_moelb", folder) as url:
        assert generate(url) == stock
        status = ask(f"{url}/moelb/status")
        assert status["mode"] == "auto"
        assert status["config"]["capacity"]["min_batch_tokens"] == 64
        assert status["controller"]["state"] == "running"
    assert stock


@pytest.mark.slow  # prefill and decode roles are parsed in CI's default
def test_the_decode_role_starts_from_its_script_and_leaves_routing_alone(folder: Path) -> None:
    with started("decode", folder) as url:
        assert generate(url, bootstrap_host="2.2.2.2", bootstrap_room=0)
        status = ask(f"{url}/moelb/status")
        assert status["mode"] == "none"
        assert set(status["totals"]["num_passes_by_lever"]) >= {"none"}
        assert status["totals"]["num_prefill_passes"] == 0
        assert all(row["phase"] != "prefill" for row in status["recent"])
