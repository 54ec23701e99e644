"""Every command of `launch/` is accepted by SGLang's own argument parser, with our flags on it.

The roles are also started: the decode role in test_started_on_cpu.py, and both as a pair, where
Mooncake is installed, in test_disaggregated.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.ab.arms import parse_arms, server_command
from sglang_moelb.ab.types import Plan
from sglang_moelb.ep.standin.launch import cpu_server_args

from .commands import RECIPES, SCRIPTS, command, fits, recipe_values

PARSE = Path(__file__).with_name("parse.py")
SERVERS = [
    (script, recipe)
    for script in SCRIPTS
    for recipe in RECIPES
    if script != "ab" and fits(script, recipe)
]
DEFAULT_MODES = {"serve_stock": None, "serve_moelb": "auto", "prefill": "auto", "decode": "none"}
UNKNOWN = ("unknown", "flag")


def server_words(words: list[str]) -> list[str]:
    """The flags that SGLang gets, of the command that a user runs."""
    if "sglang_moelb.ep.standin.launch" in words:
        ranks = int(words[words.index("--ranks") + 1])
        return [*cpu_server_args(ranks), *words[words.index("--") + 1 :]]
    return words[words.index("sglang.launch_server") + 1 :]


def arms_of(recipe: str) -> dict[str, list[str]]:
    """The server command of each arm of `ab.sh`, as `moelb ab` makes it."""
    words = command("ab", recipe)
    assert words[:2] == ["moelb", "ab"]
    texts = [words[i + 1] for i, word in enumerate(words) if word == "--arm"]
    arms = parse_arms(texts, [])
    values = recipe_values(recipe)
    plan: dict[str, Any] = {
        "arms": arms,
        "order": tuple(arm.name for arm in arms),
        "requests": (),
        "workload": "demo",
        "model": words[words.index("--model") + 1],
        "common_flags": tuple(words[words.index("--") + 1 :]),
        "rounds": 1,
        "concurrency": 1,
        "max_tokens": 1,
        "num_warmup": 1,
        "seed": 0,
        "out": Path(),
        "cpu": "--cpu" in words,
        "num_ranks": int(values["RANKS"]),
        "argv": (),
    }
    return {arm.name: server_command(Plan(**plan), arm, 30000) for arm in arms}


@pytest.fixture(scope="module")
def answers(run_with_sglang: Callable[..., Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What SGLang's parser makes of every command, by script, recipe and variant."""
    commands = {(script, recipe): command(script, recipe) for script, recipe in SERVERS}
    for script, recipe in SERVERS:
        if script != "serve_stock":
            words = command(script, recipe, "--moelb-mode", "observe")
            commands[script, recipe, "observe"] = words
    for recipe in RECIPES:
        for arm, words in arms_of(recipe).items():
            commands["ab", recipe, arm] = words
    commands[UNKNOWN] = command("serve_stock", RECIPES[0], "--no-such-flag", "1")
    asked = json.dumps([server_words(words) for words in commands.values()])
    done = run_with_sglang(PARSE.read_text(), stdin=asked)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.partition("ANSWERS\n")[2])
    return dict(zip(commands, made, strict=True))


@pytest.mark.parametrize(("script", "recipe"), SERVERS)
def test_sglang_accepts_the_command_and_we_accept_its_flags(
    answers: dict[tuple[str, ...], dict[str, Any]], script: str, recipe: str
) -> None:
    answer = answers[script, recipe]
    assert "error" not in answer, answer
    assert answer["mode"] == DEFAULT_MODES[script]
    values = recipe_values(recipe)
    role = script if script in ("prefill", "decode") else "null"
    gpu = values["DEVICE"] == "gpu"
    assert answer["args"] == {
        "tp_size": int(values["RANKS"]),
        "attn_dp_size": int(values["RANKS"]),
        "disaggregation_mode": role,
        "deepep_mode": "low_latency" if role == "decode" and gpu else "normal",
        "model_path": values["MODEL"],
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_mode_of_a_role_can_be_overridden(
    answers: dict[tuple[str, ...], dict[str, Any]], recipe: str
) -> None:
    for script in ("serve_moelb", "prefill", "decode"):
        if fits(script, recipe):
            assert answers[script, recipe, "observe"]["mode"] == "observe"


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_arms_of_the_comparison_are_accepted(
    answers: dict[tuple[str, ...], dict[str, Any]], recipe: str
) -> None:
    assert answers["ab", recipe, "stock"]["mode"] is None
    assert answers["ab", recipe, "auto"]["mode"] == "auto"


def test_a_flag_that_sglang_does_not_know_is_noticed(
    answers: dict[tuple[str, ...], dict[str, Any]],
) -> None:
    assert "--no-such-flag" in answers[UNKNOWN]["error"]
