"""The patches that mend SGLang itself: each defect shows in the wheel's form and not in ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.ep.standin.launch import cpu_environment
from sglang_moelb.patching import apply

COUNTS = [[0, 0, 0], [1, 0, 1]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def forms(
    wheel_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the probe found: in the wheel's form, in the patched form."""
    folder = tmp_path_factory.mktemp("forms")
    pristine, patched = folder / "pristine", folder / "patched"
    for site in (pristine, patched):
        shutil.copytree(wheel_files, site)
    apply(patched)
    env = {**os.environ, **cpu_environment(2)}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    script = [sys.executable, str(ROOT / "tests/patches/probe.py"), str(pristine), str(patched)]
    result = subprocess.run(script, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return found[0], found[1]


Forms = tuple[dict[str, Any], dict[str, Any]]


def test_deepstack_rows_are_scattered_like_hidden_rows(forms: Forms) -> None:
    assert [form["deepstack, scattered"] for form in forms] == ["RuntimeError", [3.0, 4.0, 5.0]]


def test_deepstack_rows_stay_whole_where_hidden_rows_do(forms: Forms) -> None:
    assert [form["deepstack, whole"] for form in forms] == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 2


def test_the_recorder_counts_in_deepep_auto_as_in_normal(forms: Forms) -> None:
    assert [form["recorder, auto"] for form in forms] == ["NotImplementedError", COUNTS]
    assert [form["recorder, normal"] for form in forms] == [COUNTS] * 2


def test_kimi_vl_names_its_experts_and_their_weights(forms: Forms) -> None:
    expected = [27, 64, 1, {"1": "weights"}]
    assert [form["kimi-vl"] for form in forms] == ["AttributeError", expected]


@pytest.mark.parametrize("order", ["", ", hf order"])
def test_qwen3_vl_moe_names_each_layer_to_the_recorder(forms: Forms, order: str) -> None:
    names = [form[f"qwen3-vl layers{order}"] for form in forms]
    assert names == [[None] * 4, [1, 2, 3, None]]
