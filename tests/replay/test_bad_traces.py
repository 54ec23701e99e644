"""`moelb replay` of traces that are spoilt: they are named with the fix, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sglang_moelb.replay.cli import replay
from sglang_moelb.trace.frames import MAGIC, PREAMBLE
from tests.trace.world import FIRST, rich_pass, writer


def changed(folder: Path, change: Callable[[bytearray], object]) -> Path:
    """`folder` with its first file changed."""
    data = bytearray((folder / FIRST).read_bytes())
    change(data)
    (folder / FIRST).write_bytes(data)
    return folder


def flipped(folder: Path) -> Path:
    def flip(data: bytearray) -> None:
        data[len(data) // 2] ^= 4

    return changed(folder, flip)


def of_the_future(folder: Path) -> Path:
    def age(data: bytearray) -> None:
        data[: PREAMBLE.size] = PREAMBLE.pack(MAGIC, 2)

    return changed(folder, age)


def foreign(folder: Path) -> Path:
    return changed(folder, lambda data: data.__setitem__(slice(0, 4), b"PAR1"))


def without_a_byte(folder: Path) -> Path:
    return changed(folder, lambda data: data.clear())


def of_two_servers(folder: Path) -> Path:
    other = folder.parent / "other"
    writer(other).add(rich_pass(9))
    shutil.copy(other / FIRST, folder / FIRST.replace("00000", "00001"))
    return folder


def run(folder: Path, out: Path) -> tuple[int, str]:
    """Exit code and what was said, of `moelb replay`."""
    app = typer.Typer()
    app.command()(replay)
    told = CliRunner().invoke(app, [str(folder), "--out", str(out), "--arms", "none"])
    return told.exit_code, " ".join(told.output.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written = writer(tmp_path / "trace")
    for step in range(4):
        written.add(rich_pass(step))
    return tmp_path / "trace"


@pytest.mark.parametrize(
    ("spoil", "message", "fix"),
    [
        (flipped, "damaged at byte", "Copy the file again"),
        (of_the_future, "trace format 2", "Install the version that wrote it"),
        (foreign, "not a trace of sglang_moelb", "Give a folder or file"),
        (without_a_byte, "nothing traced yet", "Wait for the server's first pass"),
        (of_two_servers, "not the file that follows", "in a folder of their own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_trace_is_named_with_the_fix_and_nothing_is_written(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], Path], message: str, fix: str
) -> None:
    code, said = run(spoil(folder), tmp_path / "out")
    assert code == 2
    assert message in said
    assert fix in said
    assert "rank-000.0000" in said or str(folder) in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_trace_that_was_cut_is_replayed_as_far_as_it_goes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_moelb.replay.cli.find_spec", lambda name: None)  # no plots
    changed(folder, lambda data: data.__delitem__(slice(-50, None)))
    code, said = run(folder, tmp_path / "out")
    assert code == 0, said
    assert (tmp_path / "out" / "replay.json").is_file()
