"""DeepSeek-V2, DeepSeek-V3 and Kimi-VL with the balancer: exact when it watches, held when it acts.

One stock and one balanced server for each kind of model. What Qwen3 models need is tested in
`test_bit_identity.py` and `test_levers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.demo.kimi_processor import IMAGE_TOKEN, TinyKimiImageProcessor
from sglang_moelb.demo.models import Kind

from .conftest import Serve, Server
from .talk import (
    CROWD_IMAGE,
    IMAGE,
    NO_CACHE,
    OBSERVE,
    SETTINGS,
    SHORT,
    TEXT,
    TWO_IMAGES,
    Said,
    call,
    change,
    passes_of,
    say,
    say_together,
    status,
)
from .test_exactness import (
    TEXT_PROMPTS,
    TOLERANCE,
    Prompt,
    Reference,
    ask,
    make_image,
    max_distance,
)

ROUTERS = Path(__file__).with_name("routers.py")


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of model, how its attention is laid out, and SGLang's flags that it needs."""

    kind: Kind
    attention_dp: bool
    flags: tuple[str, ...] = ()

    def prompts(self) -> tuple[Prompt, ...]:
        """What is compared to the bit, one at a time."""
        if self.kind != "kimi":
            return TEXT, SHORT
        return tuple(as_kimi(prompt) for prompt in (IMAGE, TWO_IMAGES, TEXT, SHORT))

    def crowd(self) -> list[Prompt]:
        """What is sent at once, so that a lever has work."""
        return [as_kimi(CROWD_IMAGE), TEXT] * 3 if self.kind == "kimi" else [TEXT] * 6


CASES = {
    "deepseek-tp": Case("deepseek", False),
    "deepseek-dp": Case("deepseek", True),
    "deepseek3-dp": Case("deepseek3", True),
    "kimi-dp": Case("kimi", True, ("--trust-remote-code",)),
}
_stock: dict[str, list[Said]] = {}


def as_kimi(prompt: Prompt) -> Prompt:
    """The same prompt with Kimi's mark for an image."""
    return replace(prompt, text=prompt.text.replace("<|image_pad|>", IMAGE_TOKEN))


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a case; tests of one case stand together, so that they share its servers."""
    return str(request.param)


def balanced(serve: Serve, name: str) -> Server:
    """The balanced server of a case, in mode `observe`."""
    case = CASES[name]
    server = serve(case.kind, *case.flags, *OBSERVE, attention_dp=case.attention_dp)
    change(server, {"mode": "observe", **SETTINGS})
    return server


@pytest.mark.e2e
@pytest.mark.slow
def test_stock_answers_are_varied_and_agree_with_transformers(serve: Serve, name: str) -> None:
    case = CASES[name]
    server = serve(case.kind, *case.flags, *NO_CACHE, attention_dp=case.attention_dp)
    assert call(server, "/moelb/status")[0] == 404
    _stock[name] = [say(server, prompt) for prompt in case.prompts()]
    assert len({said.tokens for said in _stock[name]}) == len(_stock[name])
    if case.kind == "kimi":
        return  # transformers has no such model
    reference = Reference(server.model, vision=False)
    distances = [max_distance(ask(server, p), reference.ask(p)) for p in TEXT_PROMPTS[:4]]
    assert max(distances) <= TOLERANCE, distances


@pytest.mark.e2e
@pytest.mark.slow
def test_observe_and_none_say_to_the_bit_what_stock_says(serve: Serve, name: str) -> None:
    server, case = balanced(serve, name), CASES[name]
    said = [say(server, prompt) for prompt in case.prompts()]
    assert said == _stock[name]
    now = status(server)
    assert now["totals"]["num_prefill_passes"] >= len(said), "the balancer saw the passes"
    assert now["topology"]["num_layers"] == 3, "the first of four layers has no experts"
    change(server, {"mode": "none"})
    assert [say(server, prompt) for prompt in case.prompts()] == said


@pytest.mark.e2e
@pytest.mark.slow
def test_rows_of_images_are_counted_as_vision(serve: Serve, name: str) -> None:
    server, case = balanced(serve, name), CASES[name]
    for prompt in case.prompts():
        passes = passes_of(server, lambda prompt=prompt: say(server, prompt, num_tokens=1))
        seen = sum(sum(one["num_vision_tokens_R"]) for one in passes)
        assert seen == sum(num_tokens_of(image) for image in prompt.images)


def num_tokens_of(image: str) -> int:
    """How many tokens Kimi's processor makes of a picture."""
    processor = TinyKimiImageProcessor()
    grid = processor.preprocess(make_image(image))["image_grid_hws"]
    return int(grid.prod()) // processor.merge**2


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("lever", ["drop", "expand"])
def test_a_lever_acts_and_holds_its_capacity(serve: Serve, name: str, lever: str) -> None:
    server, case = balanced(serve, name), CASES[name]
    change(server, {"mode": lever, "capacity": SETTINGS["capacity"]})
    passes = passes_of(server, lambda: say_together(server, case.crowd()))
    acted = [one for one in passes if one["lever"] == lever]
    assert acted
    assert any(one["lost_share" if lever == "drop" else "moved_share"] > 0 for one in acted)
    for one in acted:
        assert max(one["rows_after_R"]) <= capacity_over_layers(one, status(server)["topology"])
        pairs = zip(one["balance_after_L"], one["balance_before_L"], strict=True)
        assert all(after <= before for after, before in pairs)
    if case.kind == "kimi":
        assert sum(sum(one["num_vision_tokens_R"]) for one in acted) > 0
    said = [say(server, p, custom_params={"moelb_lossy": False}) for p in case.prompts()]
    assert said == _stock[name], "a request that refuses is answered as by stock"
    change(server, {"mode": lever, "capacity": {"factor": 0.5}})
    assert say(server, TEXT) != say(server, TEXT, custom_params={"moelb_lossy": False})


def capacity_over_layers(one: dict[str, Any], topology: dict[str, int]) -> int:
    """Rows that a rank may receive in all layers of a pass at factor 1."""
    rows = sum(one["num_tokens_R"]) * topology["topk"] // topology["num_ranks"]
    return max(1, rows) * topology["num_layers"]


def test_gate_weights_are_in_proportion_to_the_scores_that_we_take_for_them(
    run_with_sglang: Callable[..., Any],
) -> None:
    done = run_with_sglang(ROUTERS.read_text())
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.partition("ANSWERS\n")[2])
    assert set(answers) >= {"qwen3", "deepseek2-groups", "deepseek3", "deepseek3-unnamed", "kimi"}
    assert max(answers.values()) < 1e-5, answers
