"""Resident replicas on a real server: what is stored, that answers stay close, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sglang_moelb.controller.place_resident import ResidentLimits, place_resident
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    Placement,
    RankMemory,
    Sizes,
    memory_of,
    num_slots_of,
)
from sglang_moelb.stored_formats import LOW_BYTES
from sglang_moelb.types import Topology

from .conftest import Serve, Server
from .talk import (
    CROWD_IMAGE,
    IMAGE,
    NO_CACHE,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_RANKS,
    SETTINGS,
    TEXT,
    TOPK,
    TWO_IMAGES,
    Said,
    call,
    passes_of,
    said_in_observe,
    say,
    say_together,
    status,
)
from .test_exactness import Prompt

pytestmark = pytest.mark.e2e

HIDDEN, INNER = 128, 256  # of the demo models' experts
WEIGHTS = 3 * HIDDEN * INNER
GAPS = {"fp8": 8, "mxfp4": 0}  # in an expert that moves: fp8's last part, 8 bytes, begins at 16
APART = {"fp8": 0.25, "mxfp4": 0.4}  # mean of log-probabilities; found 0.13 and 0.22 at most
PROMPTS = {"image": IMAGE, "images": TWO_IMAGES, "text": TEXT}
# Stopped by the last until a test lets it go.
MOVES = {"recalibrate": True, "window_passes": 4, "min_gain": 0.01, "move_ms": 0.0}


def make_placement(low_format: str = "fp8") -> Placement:
    """Two replicas on a rank and layer, of experts that differ from layer to layer."""
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=NUM_RANKS, topk=TOPK
    )
    drawn = np.random.default_rng(3)
    shape = (NUM_LAYERS, NUM_EXPERTS)
    expert_bytes = ExpertBytes(high=2 * WEIGHTS, low=LOW_BYTES[low_format](WEIGHTS))
    limits = ResidentLimits(expert_bytes=expert_bytes, num_slots=2, keep_share=0.25)
    layers = place_resident(drawn.integers(1, 99, shape), drawn.random(shape), topology, limits)
    before, after = memory_of(layers, topology, expert_bytes)
    return Placement(
        schema=SCHEMA, version=VERSION, format=low_format,
        sizes=Sizes(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=NUM_RANKS, topk=TOPK),
        expert_bytes=expert_bytes, layers=layers, memory=RankMemory(before=before, after=after),
    )  # fmt: skip


def may_move(serve: Serve, temp: pytest.TempPathFactory, low_format: str = "fp8") -> Server:
    """A server whose replicas may move, and do not yet; it decodes in low latency."""
    return start(serve, temp, MOVES, "--deepep-mode", "auto", low_format=low_format)


def start(
    serve: Serve,
    temp: pytest.TempPathFactory,
    moves: Mapping[str, Any],
    *flags: str,
    low_format: str = "fp8",
) -> Server:
    path = temp.getbasetemp() / f"{low_format}.json"  # one path, so that servers can be shared
    path.write_bytes(make_placement(low_format).to_json())
    config = {**SETTINGS, "resident": {"placement": str(path), **moves}}
    flags = (*flags, "--moelb-mode", "none", "--moelb-config", json.dumps(config))
    return serve("vl", *NO_CACHE, *flags)


@pytest.fixture(
    scope="module", params=["mxfp4", "may-move", pytest.param("fixed", marks=pytest.mark.slow)]
)
def which(request: pytest.FixtureRequest) -> str:
    """Which server; tests of one stand together. The first has 4-bit replicas, which may move."""
    return str(request.param)


@pytest.fixture
def low_format(which: str) -> str:
    return "mxfp4" if which == "mxfp4" else "fp8"


@pytest.fixture(scope="module")
def exact(serve: Serve) -> dict[Prompt, Said]:
    """What a server without a placement says."""
    return said_in_observe(serve)


@pytest.fixture(scope="module")
def server(
    serve: Serve,
    exact: dict[Prompt, Said],
    tmp_path_factory: pytest.TempPathFactory,
    which: str,
) -> Server:
    if which == "fixed":
        return start(serve, tmp_path_factory, {})
    return may_move(serve, tmp_path_factory, "mxfp4" if which == "mxfp4" else "fp8")


@pytest.mark.parametrize("name", list(PROMPTS))
def test_answers_stay_close_to_those_without_it_in_prefill_and_decode(
    server: Server, exact: dict[Prompt, Said], low_format: str, name: str
) -> None:
    said = say(server, PROMPTS[name], num_tokens=8)
    expected = exact[PROMPTS[name]]
    pairs = zip(said.prompt_logprobs, expected.prompt_logprobs, strict=True)
    apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    assert 0 < sum(apart) / len(apart) < APART[low_format], "some experts are low, and no more"
    assert abs(said.logprobs[0] - expected.logprobs[0]) < 2 * APART[low_format]


def test_the_memory_of_experts_is_told_and_has_not_grown(
    server: Server, which: str, low_format: str
) -> None:
    placement, low = make_placement(low_format), LOW_BYTES[low_format](WEIGHTS)
    num_low = len(placement.layers[0].low_experts) // NUM_RANKS
    num_slots = num_slots_of(placement.layers, NUM_RANKS)
    assert num_low > 0 < num_slots
    memory = status(server)["memory"]
    before = NUM_LAYERS * NUM_EXPERTS // NUM_RANKS * WEIGHTS * 4  # float32 on CPU
    assert memory["experts_bytes_before"] == before
    after = before - NUM_LAYERS * (num_low * (WEIGHTS * 4 - low) - num_slots * low)
    after += low + GAPS[low_format] if which != "fixed" else 0
    assert memory["experts_bytes_after"] == after
    assert memory["experts_bytes_after"] < before
    log = server.log.read_text()
    assert f"places low in {low_format};" in log
    lines = [line for line in log.splitlines() if "memory of this rank" in line]
    assert all("before resident.placement" in line for line in lines)
    at_start, later = lines[:NUM_RANKS], lines[NUM_RANKS:]
    assert ["buffers not yet" in line for line in at_start] == [True] * NUM_RANKS
    assert ["MiB DeepEP's buffers" in line for line in later] == [True] * NUM_RANKS


def test_rows_are_told_as_split_between_copies(server: Server) -> None:
    passes = passes_of(server, lambda: say(server, IMAGE))
    (one,) = [p for p in passes if p["phase"] == "prefill"]
    assert one["lever"] == "none"
    assert sum(one["rows_after_R"]) == sum(one["rows_before_R"])
    assert one["rows_after_R"] != one["rows_before_R"]


def test_a_crowd_is_served(server: Server) -> None:
    passes = passes_of(server, lambda: say_together(server, [CROWD_IMAGE, TEXT] * 3))
    assert max(sum(one["num_tokens_R"]) for one in passes) > 0


@pytest.mark.parametrize(
    "changes", [{"mode": "drop"}, {"mode": "observe"}, {"resident": {"placement": ""}}], ids=str
)
def test_levers_cannot_be_turned_on_beside_it(server: Server, changes: dict[str, Any]) -> None:
    code, answer = call(server, "/moelb/config", changes)
    assert code == 400
    assert "resident.placement" in answer["error"]


def generated(server: Server, num_tokens: int, **prompt: Any) -> tuple[list[Any], list[Any]]:
    """Log-probabilities and ids of a prompt's tokens, and of the greedy ones after it."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0, **prompt}
    code, answer = call(server, "/generate", body)
    assert code == 200, answer
    meta = answer["meta_info"]
    return meta["input_token_logprobs"], meta["output_token_logprobs"]


def test_decode_in_low_latency_agrees_with_prefill_of_the_same_tokens(
    serve: Serve,
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
    which: str,
    low_format: str,
) -> None:
    if which == "fixed":
        server = start(serve, tmp_path_factory, {}, "--deepep-mode", "auto")
    asked, decoded = generated(server, 8, text=TEXT.text)
    ids = [entry[1] for entry in (*asked, *decoded)]
    prefilled, _ = generated(server, 1, input_ids=ids)
    apart = [abs(a[0] - b[0]) for a, b in zip(decoded, prefilled[-8:], strict=True)]
    # A token stands elsewhere in its batch, so some of its copies are others.
    assert 0 < sum(apart) / len(apart) < APART[low_format]
