"""Laws of the stand-in's plugin: silent unless asked for, and loud when SGLang differs.

SGLang's CPU modules can only be imported with the stand-in's environment, so these tests run small
programs with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_moelb.ep.standin import hooks
from sglang_moelb.ep.standin.hooks import SHADOWED, SITE, SYMBOLS, Symbol, find_symbol_problems
from sglang_moelb.ep.standin.launch import cpu_environment

PROGRAM_TIMEOUT_S = 120


def _run(program: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
    )


def test_every_symbol_is_what_the_installed_sglang_has(run_with_sglang: Callable[..., Any]) -> None:
    program = (
        "from sglang_moelb.ep.standin.hooks import *\n"
        "assert find_symbol_problems(SYMBOLS) == [], find_symbol_problems(SYMBOLS)\n"
        "assert find_shadow_problems() == [], find_shadow_problems()\n"
        "print('checked', len(SYMBOLS))"
    )
    done = run_with_sglang(program)
    assert f"checked {len(SYMBOLS)}" in done.stdout, done.stderr


MUTILATED = """
import sglang.srt.layers.moe.token_dispatcher.deepep as deepep
{mutilation}
from sglang.srt.plugins import load_plugins
load_plugins()
print("still running")
"""


@pytest.mark.parametrize(
    ("mutilation", "expected", "found"),
    [
        (
            "deepep.DeepEPBuffer.get_deepep_buffer = classmethod(lambda cls, group, more: None)",
            "expected (group, hidden_size,",
            "found (group, more)",
        ),
        ("del deepep.DeepEPNormalCombineInput", "expected (hidden_states,", "AttributeError"),
    ],
)
def test_a_changed_sglang_ends_the_process_with_expected_and_found(
    run_with_sglang: Callable[..., Any], mutilation: str, expected: str, found: str
) -> None:
    done = run_with_sglang(MUTILATED.format(mutilation=mutilation))
    assert done.returncode == 1, done.stderr
    assert "still running" not in done.stdout
    assert "moelb stand-in cannot be installed" in done.stderr
    assert expected in done.stderr
    assert found in done.stderr


def test_a_module_from_elsewhere_ends_the_process_and_names_the_fix() -> None:
    env = {**cpu_environment(2), "PYTHONPATH": ""}
    program = "from sglang_moelb.ep.standin.hooks import register; register()"
    done = _run(program, env)
    assert done.returncode == 1
    assert f"module deep_ep: expected in {SITE}" in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_unrequested_the_plugin_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_MOELB_STANDIN", raising=False)
    monkeypatch.setattr(hooks, "_install", lambda: pytest.fail("installed"))
    monkeypatch.setattr(hooks, "SYMBOLS", (Symbol(path="no.such", parameters=None, why="test"),))
    hooks.register()


def test_the_detokenizer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MOELB_STANDIN", "1")
    called: list[str] = []
    monkeypatch.setattr(hooks, "find_shadow_problems", lambda: called.append("checked"))
    monkeypatch.setattr(hooks, "find_symbol_problems", lambda symbols: None)
    monkeypatch.setattr(hooks, "_install", lambda: called.append("installed"))
    managers = "sglang.srt.managers"
    monkeypatch.setitem(sys.modules, f"{managers}.detokenizer_manager", ModuleType("d"))
    monkeypatch.delitem(sys.modules, f"{managers}.scheduler", raising=False)
    hooks.register()
    assert called == []
    monkeypatch.setitem(sys.modules, f"{managers}.scheduler", ModuleType("s"))
    hooks.register()
    assert called == ["checked", "installed"]


def test_a_missing_symbol_is_reported_with_its_reason() -> None:
    symbol = Symbol(path="sglang_moelb.ep.standin.hooks.gone", parameters=("a",), why="needed")
    (problem,) = find_symbol_problems((symbol,))
    assert "hooks.gone [needed]: expected (a), found AttributeError" in problem


def test_the_site_folder_holds_every_shadowed_module() -> None:
    for name in SHADOWED:
        assert (SITE / name / "__init__.py").is_file()


def test_a_users_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('mine too')")
    done = _run("import sitecustomize", {"PYTHONPATH": f"{SITE}{os.pathsep}{tmp_path}"})
    assert done.stdout.splitlines() == ["mine too"], done.stderr


def test_a_server_process_starts_without_what_only_the_report_needs() -> None:
    program = "import gc; print(gc.get_threshold()[0])\nimport sklearn"
    done = _run(program, {"PYTHONPATH": str(SITE)})
    assert done.stdout.strip() == "50000"
    assert "No module named 'sklearn'" in done.stderr or "import of sklearn halted" in done.stderr
    assert _run("import sklearn", {"PYTHONPATH": ""}).returncode == 0


def test_torchvision_can_be_imported_with_the_site_folder() -> None:
    done = _run("import torchvision; print(torchvision.__name__)", {"PYTHONPATH": str(SITE)})
    assert done.stdout.strip() == "torchvision", done.stderr
