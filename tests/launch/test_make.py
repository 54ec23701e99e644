"""`make`, CI and the installation as text: what calls what, and that pins are equal."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from sglang_moelb.ep.install import SGLANG_VERSION

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("install", "demo", "test", "test-all", "check", "bench", "clean")


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
    assert "install_promtool.sh" not in plan("demo")
    assert "install_promtool.sh .venv/bin" in plan("test")


def test_ci_runs_make_test_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test < /dev/null"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


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


FAKES = {
    "moelb": """#!/bin/bash
case $2 in
  status) echo "sglang 0.5.23 in $PYTHONPATH: $(cat "$PYTHONPATH/sglang/state"), and so on" ;;
  apply) echo applied > "$4/sglang/state" ;;
  revert) echo "${REVERTED:-pristine}" > "$4/sglang/state" ;;
esac
""",
    "python": """#!/bin/bash
here=$(dirname "$0")
[[ $1 != -c ]] || { echo "$here/site"; exit; }
call="$(cat "${PYTHONPATH:-$here/site}/sglang/state"): $*"
echo "$call" >> "$here/calls"
[[ $call != "${FAIL:-none}"* ]] || exit 3
""",
    "mypy": """#!/bin/bash
exec "$(dirname "$0")/python" "mypy $*"
""",
}
IN_CI = {
    "applied: -m pytest -m e2e and not slow tests/e2e/test_bit_identity.py "
    "tests/e2e/test_levers.py -k not text_with_tensor and not hot_changes and not room",
    "pristine: -m pytest -m e2e and not slow tests",
    "pristine: mypy sglang_moelb",
    "applied: -m pytest -m not e2e and not slow"
    " tests/ep/test_seams.py tests/ep/test_runtime.py tests/ep/test_flags.py",
    "pristine: -m pytest -m not e2e and not slow tests",
}


def run_both_forms(
    folder: Path, scope: str = "ci", state: str = "pristine", **env: str
) -> tuple[int, list[str], list[str]]:
    """Exit code, every call in its state, lines said; the installed SGLang must stay as it is."""
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    installed = folder / "site" / "sglang" / "state"
    installed.parent.mkdir(parents=True)
    installed.write_text(state + "\n")
    (folder / "site" / "sglang-0.5.23.dist-info").mkdir()
    (folder / "calls").touch()
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_both_forms.sh"), scope],
        env={"PATH": "/usr/bin:/bin", "BIN": str(folder), "TMPDIR": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert installed.read_text() == state + "\n"
    assert not list(folder.glob("tmp.*")), "the copy is gone"
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, calls, done.stdout.splitlines()


def test_ci_runs_both_forms_and_its_log_ends_with_how_each_run_ended(tmp_path: Path) -> None:
    code, calls, said = run_both_forms(tmp_path)
    assert code == 0
    assert len(calls) == len(IN_CI)
    assert set(calls) == IN_CI
    assert all(line.startswith("exit code 0 after") for line in said[-len(IN_CI) :])
    assert "summary" in said[-len(IN_CI) - 1]


def test_everything_is_the_whole_suite_and_the_demo_in_both_forms(tmp_path: Path) -> None:
    code, calls, _ = run_both_forms(tmp_path, "all")
    assert code == 0
    for form in ("applied", "pristine"):
        assert f"{form}: -m pytest -m e2e tests" in calls
        assert f"{form}: -m pytest -m not e2e tests" in calls
        assert len([c for c in calls if c.startswith(f"{form}: -m sglang_moelb.demo")]) == 1


@pytest.mark.parametrize("call", sorted(IN_CI))
def test_any_failure_fails_and_the_other_runs_are_still_made(tmp_path: Path, call: str) -> None:
    code, calls, said = run_both_forms(tmp_path, FAIL=call)
    assert code == 3
    assert set(calls) == IN_CI
    assert len([line for line in said if line.startswith("exit code 3 after")]) == 1


def test_patches_that_do_not_revert_to_the_wheel_fail(tmp_path: Path) -> None:
    code, _, said = run_both_forms(tmp_path, REVERTED="something else")
    assert code == 1
    assert any(line.startswith("Files ") and line.endswith(" differ") for line in said)


def test_an_environment_that_is_not_pristine_is_refused_and_left_alone(tmp_path: Path) -> None:
    code, calls, _ = run_both_forms(tmp_path, state="applied")
    assert (code, calls) == (2, [])
