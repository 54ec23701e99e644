"""`moelb doctor` on this machine and on made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sglang_moelb.doctor import cli, probe
from sglang_moelb.doctor.facts import Facts
from sglang_moelb.ep.seams import SEAMS

from .world import laptop, with_package

app = typer.Typer()
app.command()(cli.doctor)


def run(monkeypatch: pytest.MonkeyPatch, facts: Facts, *args: str) -> tuple[int, str]:
    monkeypatch.setattr(cli, "probe", lambda: facts)
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_exit_code_says_whether_something_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, laptop())[0] == 0
    code, output = run(monkeypatch, with_package(laptop(seams=()), "SGLang", ""))
    assert code == 1
    assert "pip install sglang==0.5.23" in output


def test_json_carries_facts_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(monkeypatch, laptop(), "--json")
    tree = json.loads(output)
    assert code == 0
    assert tree["can_run"] is True
    assert tree["facts"]["python"] == [3, 11, 7]
    assert {"section", "what", "mark", "found", "fix"} == set(tree["rows"][0])


def test_brackets_in_what_was_found_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = laptop(missing_extras=("matplotlib",))
    assert "sglang-moelb[ab]" in run(monkeypatch, facts)[1]


def test_this_machine_is_probed_without_importing_sglang_or_torch() -> None:
    script = (
        "import sys\n"
        "from sglang_moelb.doctor.judge import judge\n"
        "from sglang_moelb.doctor.probe import probe\n"
        "facts = probe()\n"
        "judge(facts)\n"
        "assert not {'sglang', 'torch'} & set(sys.modules)\n"
        "print(len(facts.seams), facts.package('SGLang').found)\n"
    )
    begun_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(len(SEAMS)), "0.5.23"]
    assert time.monotonic() - begun_s < 30  # the limit of 5 s is for an idle machine


def test_nvidia_smi_is_asked_and_its_failure_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ ${1%%=*} = --query-gpu ] && echo 'H100, 9.0, 81559, 580'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = probe.probe()
    assert [gpu.name for gpu in facts.gpus] == ["H100"]
    assert facts.driver == "580"
    smi.write_text("#!/bin/sh\nexit 6\n")
    assert probe.probe().gpus == ()


@pytest.mark.parametrize(
    ("plugins", "allowed"), [("", True), ("moelb, moelb_standin", True), ("other", False)]
)
def test_sglang_plugins_decides_whether_we_are_loaded(
    monkeypatch: pytest.MonkeyPatch, plugins: str, allowed: bool
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    monkeypatch.setenv("SGLANG_PLATFORM", "somewhere-else")
    facts = probe.probe()
    assert facts.sglang_plugins == plugins
    assert [p.found for p in facts.plugins] == [True, True]
    assert [p.allowed for p in facts.plugins] == [allowed, allowed]
    assert all(p.platform_allows for p in facts.plugins)


def test_a_machine_without_sglang_is_described_not_crashed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    monkeypatch.setattr(probe.seams, "find_spec", lambda name: None)
    monkeypatch.setattr("sglang_moelb.patching.site.find_spec", lambda name: None)
    facts = probe.probe()
    assert facts.seams == ()
    assert "not installed" in facts.patch.error
    assert "matplotlib" in facts.missing_extras


def test_the_command_works_where_what_the_ab_tool_needs_is_missing() -> None:
    script = (
        "import sys\n"
        "for name in ('aiohttp', 'jinja2', 'matplotlib', 'PIL', 'skimage', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "from sglang_moelb.cli import main\n"
        "sys.argv = ['moelb', 'doctor', '--json']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    assert json.loads(done.stdout)["rows"]


def test_the_command_can_be_asked_without_the_console_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_moelb.doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    tree = json.loads(done.stdout)
    assert done.returncode == (0 if tree["can_run"] else 1)
