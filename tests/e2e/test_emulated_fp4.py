"""Emulated FP4 under the lever on a real server: its own answers, its own memory."""

from __future__ import annotations

import json

import pytest

from .conftest import Serve
from .talk import (
    IMAGE,
    LOW_RULE,
    NO_CACHE,
    NUM_EXPERTS,
    NUM_RANKS,
    SETTINGS,
    TEXT,
    said_under,
    status,
)
from .test_downgrade import HIDDEN, INNER, LOW, apart

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "num_bytes_a_weight"),
    [("nvfp4-emulated", 1 / 2 + 1 / 16), ("mxfp4-emulated", 17 / 32)],
)
def test_a_lowered_rank_answers_otherwise_but_close_and_text_to_the_bit(
    serve: Serve, name: str, num_bytes_a_weight: float
) -> None:
    config = {**SETTINGS, "downgrade": {**LOW_RULE, "format": name}}
    flags = ("--moelb-mode", "downgrade", "--moelb-config", json.dumps(config))
    server = serve("vl", *NO_CACHE, *flags)
    exact, _ = said_under(server, {"mode": "none"}, IMAGE)
    text, _ = said_under(server, {"mode": "none"}, TEXT)
    lowered, passes = said_under(server, LOW, IMAGE)
    assert 0 < sum(passes[0]["low_rows_R"]) < sum(passes[0]["rows_before_R"])
    assert lowered != exact
    assert 0 < apart(lowered, exact) < 0.5
    assert said_under(server, LOW, TEXT)[0] == text
    told = status(server)
    assert told["config"]["downgrade"]["format"] == name
    assert told["downgrade"]["num_host_waits"] == 0
    num_local = NUM_EXPERTS // NUM_RANKS
    globals_ = 2 * 4 * num_local if name == "nvfp4-emulated" else 0
    one = int(num_local * 3 * HIDDEN * INNER * num_bytes_a_weight) + globals_
    assert told["memory"]["staging_bytes"] == 2 * one
