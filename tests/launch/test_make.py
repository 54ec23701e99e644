"""`make`, CI and the installation as text: what calls what, and that pins are equal."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from sglang_moelb.ep.install import SGLANG_VERSION

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("install", "demo", "test", "check", "bench", "clean")


def plan(target: str) -> str:
    """What `make TARGET` would run."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


def pins(file: str) -> dict[str, str]:
    """Names and versions of a requirements file, which has nothing but pins."""
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_plan(target: str) -> None:
    assert plan(target)


def test_the_demo_installs_no_test_tools() -> None:
    assert "requirements/test.txt" not in plan("demo")
    assert "scripts/install_cpu.sh" in plan("demo")
    assert "requirements/test.txt" in plan("test")


def test_ci_runs_make_test_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test < /dev/null"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_whole_suite_runs_last_so_that_its_summary_ends_the_log() -> None:
    script = (ROOT / "scripts" / "test_both_forms.sh").read_text(encoding="utf-8")
    runs = re.findall(r"-m pytest.*", script)
    assert len(runs) == 2
    assert "patched_tests" in runs[0]
    assert runs[1] == '-m pytest -m "${MARKS:-not slow}"'


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.stem
)
def test_scripts_are_valid_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_test_tools_have_the_pins_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = dict(line.split("==") for line in project["optional-dependencies"]["test"])
    assert pins("test.txt") == extra


def test_sglang_is_pinned_alike_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["gpu"] == [f"sglang=={SGLANG_VERSION}"]
    assert pins("cpu-nodeps.txt")["sglang"] == SGLANG_VERSION
    assert (ROOT / "patches" / f"sglang-{SGLANG_VERSION}" / "series").is_file()


FAKE_MOELB = """#!/bin/bash
state=$(dirname "$0")/state
case "$2" in
  status) echo "sglang 0.5.23 in /site: $(cat "$state"), and so on" ;;
  apply) echo applied > "$state" ;;
  revert) echo pristine > "$state" ;;
esac
"""
FAKE_PYTHON = """#!/bin/bash
here=$(dirname "$0")
echo "$(cat "$here/state"): $*" >> "$here/calls"
[[ $(cat "$here/state") != "${FAIL_WHEN:-never}" ]] || exit 3
"""


def run_both_forms(folder: Path, state: str = "pristine", **env: str) -> tuple[int, list[str], str]:
    """Exit code, what pytest was called with in which state, and the state left behind."""
    for name, text in (("moelb", FAKE_MOELB), ("python", FAKE_PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "state").write_text(state + "\n")
    (folder / "calls").touch()
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_both_forms.sh")],
        env={"PATH": "/usr/bin:/bin", "BIN": str(folder), **env},
        capture_output=True,
        timeout=30,
        check=False,
    )
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, calls, (folder / "state").read_text().strip()


def test_both_forms_are_run_and_the_environment_is_left_pristine(tmp_path: Path) -> None:
    code, calls, left = run_both_forms(tmp_path)
    assert (code, left) == (0, "pristine")
    assert calls[0].startswith("applied: -m pytest -k ")
    assert "tests/ep/test_seams.py" in calls[0]
    assert calls[1] == "pristine: -m pytest -m not slow"


@pytest.mark.parametrize("form", ["applied", "pristine"])
def test_a_failure_in_either_form_fails_and_is_still_reverted(tmp_path: Path, form: str) -> None:
    code, calls, left = run_both_forms(tmp_path, FAIL_WHEN=form)
    assert (code, left) == (3, "pristine")
    assert len(calls) == 2


def test_an_environment_that_is_not_pristine_is_refused_and_left_alone(tmp_path: Path) -> None:
    code, calls, left = run_both_forms(tmp_path, state="applied")
    assert (code, calls, left) == (2, [], "applied")
