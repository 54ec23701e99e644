"""`moelb patch`: what a user sees, and the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from sglang_moelb.patching.cli import app
from sglang_moelb.patching.series import load_series, touched_paths

from .trees import VERSION, tree_hash

PATHS = touched_paths(load_series(VERSION))


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.output


def test_apply_status_and_revert_say_what_they_did(site: Path) -> None:
    before = tree_hash(site)
    code, output = run("apply", "--site", str(site))
    assert (code, f"sglang {VERSION} in {site}: applied" in output) == (0, True)
    code, output = run("status", "--site", str(site))
    assert (code, "all patches applied" in output) == (0, True)
    code, output = run("revert", "--site", str(site))
    assert (code, "pristine" in output) == (0, True)
    assert tree_hash(site) == before


def test_a_refusal_is_one_error_with_exit_code_one(site: Path) -> None:
    path = site / PATHS[1]
    path.write_text("# mine\n")
    code, output = run("apply", "--site", str(site))
    assert code == 1
    assert output.startswith("error: ")
    assert PATHS[1] in output
    assert "Traceback" not in output


def test_status_of_a_modified_tree_exits_with_one(site: Path) -> None:
    (site / PATHS[1]).write_text("# mine\n")
    code, output = run("status", "--site", str(site))
    assert (code, "changed by someone else" in output) == (1, True)


def test_a_folder_without_sglang_is_refused_by_name(tmp_path: Path) -> None:
    code, output = run("status", "--site", str(tmp_path))
    assert (code, f"--site {tmp_path}" in output) == (1, True)


def test_a_source_tree_is_refused_with_the_fix(site: Path) -> None:
    for info in site.glob("*.dist-info"):
        for file in info.iterdir():
            file.unlink()
        info.rmdir()
    code, output = run("apply", "--site", str(site))
    assert (code, "install the wheel" in output) == (1, True)


def test_a_read_only_site_is_refused_with_the_fix(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree_hash(site)
    opened = Path.open

    def refuse_writing(self: Path, mode: str = "r", **kwargs: Any) -> IO[Any]:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, **kwargs)

    monkeypatch.setattr(Path, "open", refuse_writing)
    code, output = run("apply", "--site", str(site))
    assert (code, "nothing was changed" in output) == (1, True)
    assert tree_hash(site) == before


def test_the_default_site_is_found_without_importing_sglang(site: Path) -> None:
    script = (
        "import sys; from sglang_moelb.patching import status; print(status().site); "
        "assert not {'sglang', 'torch'} & set(sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), root])}
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == str(site), result.stderr
