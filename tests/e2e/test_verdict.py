"""A server that keeps score says so in its status, in `/server_info` and in its log."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Serve, Server
from .talk import CROWD_IMAGE, TEXT, call, change, observed, say_together, status, until

pytestmark = pytest.mark.e2e

LINE = "sglang_moelb: verdict: leave it off, because not enough: "
SCORED_S = 150.0


def verdict(server: Server) -> dict[str, Any] | None:
    told: dict[str, Any] | None = status(server)["verdict"]
    return told


def test_the_verdict_is_in_the_status_and_in_the_log_while_it_is_asked_for(serve: Serve) -> None:
    server = observed(serve)
    assert verdict(server) is None
    assert LINE not in server.log.read_text(errors="replace")
    change(server, {"verdict": {"enabled": True, "log_interval_s": 0.2}})

    def scored() -> bool:
        say_together(server, [TEXT, CROWD_IMAGE], num_tokens=1)
        told = verdict(server)
        return bool(told and told["scores"])

    until(scored, SCORED_S)
    told = verdict(server)
    assert told is not None
    assert told["num_passes"] >= told["num_passes_needed"]
    for score in told["scores"].values():
        assert score["gain_low"] <= score["gain"] <= score["gain_high"]
        assert 0.0 <= score["lost_mass_share"] <= 1.0
    code, info = call(server, "/server_info")
    assert code == 200
    leaders = [s["moelb"]["verdict"] for s in info["internal_states"] if "verdict" in s["moelb"]]
    assert len(leaders) == 1
    lines = [line for line in server.log.read_text(errors="replace").splitlines()
             if "sglang_moelb: verdict: " in line]  # fmt: skip
    assert LINE in lines[0]
    assert told["text"].partition(":")[0].partition(",")[0] in lines[-1]
    change(server, {"verdict": {"enabled": False, "log_interval_s": 60.0}})
    until(lambda: verdict(server) is None)
