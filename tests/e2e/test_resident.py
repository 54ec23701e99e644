"""Resident replicas on a real server: what is stored, that answers stay close, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
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
    observed,
    passes_of,
    say,
    say_together,
    status,
)

pytestmark = pytest.mark.e2e

HIDDEN, INNER = 128, 256  # of the demo models' experts
WEIGHTS = 3 * HIDDEN * INNER
LOW = WEIGHTS + 4 * WEIGHTS // 128**2
PROMPTS = {"image": IMAGE, "images": TWO_IMAGES, "text": TEXT}


def make_placement() -> Placement:
    """Two replicas on a rank and layer, of experts that differ from layer to layer."""
    topology = Topology(
        num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=NUM_RANKS, topk=TOPK
    )
    drawn = np.random.default_rng(3)
    shape = (NUM_LAYERS, NUM_EXPERTS)
    expert_bytes = ExpertBytes(high=2 * WEIGHTS, low=LOW)
    limits = ResidentLimits(expert_bytes=expert_bytes, num_slots=2, keep_share=0.25)
    layers = place_resident(drawn.integers(1, 99, shape), drawn.random(shape), topology, limits)
    before, after = memory_of(layers, topology, expert_bytes)
    return Placement(
        schema=SCHEMA, version=VERSION, format="fp8",
        sizes=Sizes(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_ranks=NUM_RANKS, topk=TOPK),
        expert_bytes=expert_bytes, layers=layers, memory=RankMemory(before=before, after=after),
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(serve: Serve) -> dict[str, Said]:
    """What a server without a placement says."""
    server = observed(serve)
    return {name: say(server, prompt, num_tokens=8) for name, prompt in PROMPTS.items()}


@pytest.fixture(scope="module")
def server(
    serve: Serve, exact: dict[str, Said], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    path: Path = tmp_path_factory.mktemp("placement") / "p.json"
    path.write_bytes(make_placement().to_json())
    config = {**SETTINGS, "resident": {"placement": str(path)}}
    return serve("vl", *NO_CACHE, "--moelb-mode", "none", "--moelb-config", json.dumps(config))


@pytest.mark.parametrize("name", list(PROMPTS))
def test_answers_stay_close_to_those_without_it_in_prefill_and_decode(
    server: Server, exact: dict[str, Said], name: str
) -> None:
    said = say(server, PROMPTS[name], num_tokens=8)
    pairs = zip(said.prompt_logprobs, exact[name].prompt_logprobs, strict=True)
    apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    assert 0 < sum(apart) / len(apart) < 0.25, "some experts are float8, and no more than that"
    assert abs(said.logprobs[0] - exact[name].logprobs[0]) < 0.5


def test_the_memory_of_experts_is_told_and_has_not_grown(server: Server) -> None:
    placement = make_placement()
    num_low = len(placement.layers[0].low_experts) // NUM_RANKS
    num_slots = num_slots_of(placement.layers, NUM_RANKS)
    assert num_low > 0 < num_slots
    memory = status(server)["memory"]
    before = NUM_LAYERS * NUM_EXPERTS // NUM_RANKS * WEIGHTS * 4  # float32 on CPU
    assert memory["experts_bytes_before"] == before
    after = before - NUM_LAYERS * (num_low * (WEIGHTS * 4 - LOW) - num_slots * LOW)
    assert memory["experts_bytes_after"] == after
    assert memory["experts_bytes_after"] < before
    assert "resident placement" in server.log.read_text()


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
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(make_placement().to_json())
    config = {**SETTINGS, "resident": {"placement": str(path)}}
    flags = ["--deepep-mode", "auto", "--moelb-mode", "none", "--moelb-config", json.dumps(config)]
    server = serve("vl", *NO_CACHE, *flags)
    asked, decoded = generated(server, 8, text=TEXT.text)
    ids = [entry[1] for entry in (*asked, *decoded)]
    prefilled, _ = generated(server, 1, input_ids=ids)
    apart = [abs(a[0] - b[0]) for a, b in zip(decoded, prefilled[-8:], strict=True)]
    # A token stands elsewhere in its batch, so some of its copies are others.
    assert 0 < sum(apart) / len(apart) < 0.25
