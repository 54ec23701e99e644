"""The lever replicate on a real server: ranks balanced, answers as stock SGLang's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Serve, Server
from .talk import (
    IMAGE,
    NO_CACHE,
    NUM_LAYERS,
    NUM_RANKS,
    SETTINGS,
    TEXT,
    TWO_IMAGES,
    Said,
    change,
    passes_of,
    say,
)

pytestmark = pytest.mark.e2e

NUM_SLOTS = 3
KNOBS = {"min_rows": 1}
MODE = {"mode": "replicate", "replicate": KNOBS}
START = {**SETTINGS, "replicate": {**KNOBS, "slots": NUM_SLOTS}}
FLAGS = (*NO_CACHE, "--moelb-mode", "replicate", "--moelb-config", json.dumps(START))
HIDDEN, INNER = 128, 256  # of the demo models' experts
# float32 on CPU, where the rows of a token are added up rank by rank: a copy on another rank
# changes the order, and a sum of 4 rows rounds by a few of 2**-24 of its size in each of 4 layers.
TOLERANCE = 1e-4


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server with slots, in mode none."""
    server = serve("vl", *FLAGS)
    change(server, {"mode": "none", **SETTINGS, "replicate": KNOBS})
    return server


def said_under(
    server: Server, changes: dict[str, Any], prompt: Any, **asked: Any
) -> tuple[Said, list[dict[str, Any]]]:
    """What the server says after `changes`, and the passes that took."""
    change(server, changes)
    said: list[Said] = []
    passes = passes_of(server, lambda: said.append(say(server, prompt, **asked)))
    return said[0], passes


def apart(one: Said, other: Said) -> float:
    """Largest distance of two log-probabilities of the prompt or the answer."""
    assert one.tokens == other.tokens
    pairs = [
        (a, b)
        for a, b in zip(
            one.prompt_logprobs + one.logprobs, other.prompt_logprobs + other.logprobs, strict=True
        )
        if a is not None and b is not None
    ]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("prompt", [IMAGE, TWO_IMAGES, TEXT], ids=["image", "images", "text"])
def test_ranks_are_balanced_and_greedy_tokens_are_those_of_stock(
    server: Server, prompt: Any
) -> None:
    exact, before = said_under(server, {"mode": "none"}, prompt)
    said, passes = said_under(server, MODE, prompt)
    (one,) = [p for p in passes if p["lever"] == "replicate"]
    assert one["phase"] == "prefill"
    assert one["rows_before_R"] == before[0]["rows_before_R"]
    assert sum(one["rows_after_R"]) == sum(one["rows_before_R"]), "no row is lost or made"
    assert max(one["balance_before_L"]) > 1.05
    assert max(one["balance_after_L"]) < 1.02
    assert 0 < sum(one["num_copies_R"]) <= NUM_SLOTS * NUM_RANKS * NUM_LAYERS
    assert one["lost_share"] == 0
    assert apart(said, exact) < TOLERANCE
