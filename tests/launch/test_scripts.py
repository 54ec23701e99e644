"""The scripts and recipes of `launch/` as text and as commands; nothing is started here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from sglang_moelb.ab.arms import parse_arms
from sglang_moelb.config import Config, load, merge

from .commands import KEYS, LAUNCH, RECIPES, SCRIPTS, command, fits, recipe_values, run

MAX_LINES = 40
FILES = sorted(LAUNCH.glob("*.sh"))
PAIRS = [(script, recipe) for script in SCRIPTS for recipe in RECIPES if fits(script, recipe)]


def test_there_is_a_script_for_every_use_and_a_recipe_for_every_hardware() -> None:
    assert {path.stem for path in FILES} == {*SCRIPTS, "common"}
    assert {recipe.rpartition("_")[2] for recipe in RECIPES} == {"cpu", "h100x2", "h100x4"}
    for script in SCRIPTS:
        assert any(fits(script, recipe) for recipe in RECIPES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_script_is_short_valid_bash_and_quotes_what_it_expands(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    if path.stem != "common":
        assert text.startswith("#!/usr/bin/env bash\n#")
        assert path.stat().st_mode & 0o111
    code = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    # An array or an argument list outside double quotes would be split at spaces.
    unquoted = [line for line in code if re.search(r'(?<!")\$(@|\{\w+\[@\]|\{@)', line)]
    assert [line for line in unquoted if not re.search(r'"[^"]*\$(@|\{\w+\[|\{@)', line)] == []
    assert not re.search(r"`|\beval\b", "\n".join(code))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_values_only(recipe: str) -> None:
    values = recipe_values(recipe)
    assert set(values) <= set(KEYS)
    assert {"MODEL", "DEVICE", "RANKS", "FLAGS"} <= set(values)
    assert values["DEVICE"] in ("cpu", "gpu")
    assert not re.search(r"[$`;|<>']", "".join(values.values()))
    assert "--moelb" not in values["FLAGS"]


def test_nothing_in_a_recipe_is_executed(tmp_path: Path) -> None:
    recipe = tmp_path / "evil.env"
    values = f"MODEL=$(touch {tmp_path}/a)\nDEVICE=gpu\nRANKS=2\nFLAGS=`touch {tmp_path}/b`\n"
    recipe.write_text(values)
    words = command("serve_stock", str(recipe))
    assert "$(touch" in " ".join(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.env"]


def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path) -> None:
    missing = run("serve_stock", "no-such")
    assert missing.returncode == 2
    assert "'no-such'" in missing.stderr
    assert "tiny-vl_cpu.env" in missing.stderr
    wrong = tmp_path / "wrong.env"
    wrong.write_text("MODEL=m\nNUMBER=4\n")
    done = run("serve_moelb", str(wrong))
    assert done.returncode == 2
    assert "'NUMBER'" in done.stderr
    assert run("serve_stock").returncode == 2
    role = run("prefill", "tiny-vl_cpu")
    assert role.returncode == 2
    assert "PREFILL_FLAGS" in role.stderr


def test_json_among_the_flags_reaches_the_server_and_the_arm_whole(tmp_path: Path) -> None:
    text = '{"replicate":{"ready":true,"slots":8}}'
    recipe = tmp_path / "json.env"
    recipe.write_text(f"MODEL=m\nDEVICE=gpu\nRANKS=4\nFLAGS=\nMOELB_FLAGS=--moelb-config {text}\n")
    assert command("serve_moelb", str(recipe))[-2:] == ["--moelb-config", text]
    words = command("ab", str(recipe))
    arms = parse_arms([words[i + 1] for i, word in enumerate(words) if word == "--arm"], [])
    assert list(arms[1].flags) == ["--moelb-mode", "auto", "--moelb-config", text]


def test_flags_of_the_caller_come_last_and_the_model_may_come_from_the_environment() -> None:
    words = command("serve_moelb", "tiny-vl_cpu", "--moelb-mode", "observe")
    assert words[-2:] == ["--moelb-mode", "observe"]
    done = run("serve_stock", "tiny-vl_cpu", MODEL="/elsewhere/model", PYTHON="/some/python")
    assert "--model-path /elsewhere/model" in done.stdout
    assert done.stdout.startswith("/some/python ")


@pytest.mark.parametrize(("script", "recipe"), PAIRS)
def test_a_cpu_recipe_goes_through_the_standin_and_a_gpu_recipe_does_not(
    script: str, recipe: str
) -> None:
    words = command(script, recipe)
    cpu = recipe_values(recipe)["DEVICE"] == "cpu"
    if script == "ab":
        assert ("--cpu" in words, "--gpu" in words) == (cpu, not cpu)
    else:
        assert ("sglang_moelb.ep.standin.launch" in words) == cpu
        assert ("sglang.launch_server" in words) == (not cpu)


@pytest.mark.parametrize("recipe", [one for one in RECIPES if "_h100x" in one])
def test_a_gpu_recipe_makes_room_for_the_levers_but_not_in_decode(recipe: str) -> None:
    for script in ("serve_moelb", "prefill"):
        words = command(script, recipe)
        config = merge(Config(), load(words[words.index("--moelb-config") + 1]))
        assert config.replicate.ready
        assert config.downgrade.ready
    assert "--moelb-config" not in command("decode", recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_role_has_its_own_default_mode_and_stock_has_none(recipe: str) -> None:
    def modes(script: str) -> list[str]:
        words = command(script, recipe)
        return [words[i + 1] for i, word in enumerate(words) if word == "--moelb-mode"]

    assert modes("serve_stock") == []
    assert not [word for word in command("serve_stock", recipe) if word.startswith("--moelb")]
    assert modes("serve_moelb") == ["auto"]
    if fits("prefill", recipe):
        assert modes("prefill") == ["auto"]
    if fits("decode", recipe):
        assert modes("decode") == ["none"]
