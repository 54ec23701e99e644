"""What is left of a trace after a crash, at every byte where it may end, and after every damage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_moelb.trace import frames
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.types import TraceError
from tests.trace.world import FIRST, rich_pass, writer

LAST_BYTES = 4096
ROOT = Path(__file__).resolve().parents[2]
FULL_DISK = """
import resource, sys, pathlib
from sglang_moelb.trace.background import BackgroundWriter
from tests.trace.world import rich_pass, writer

folder, limit = pathlib.Path(sys.argv[1]), 10_000  # bytes of a file
background = BackgroundWriter(writer(folder))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for step in range(40):
    background.add(rich_pass(step))
background.close()
print(background.stats.state, background.stats.num_passes, background.stats.num_bytes)
"""


@pytest.fixture
def long(tmp_path: Path) -> tuple[Path, list[int]]:
    """A file of more than its last 4 KB, and where its frames end."""
    written = writer(tmp_path / "whole")
    while written.num_bytes < LAST_BYTES + 1500:
        written.add(rich_pass(written.num_passes))
    path = tmp_path / "whole" / FIRST
    with path.open("rb") as file:
        return path, [frame.end for frame in frames.frames(path, file)]


def test_a_trace_cut_at_every_byte_of_its_last_4_kb_opens_with_all_whole_passes(
    long: tuple[Path, list[int]], tmp_path: Path
) -> None:
    path, ends = long
    data = path.read_bytes()
    cut = tmp_path / "cut.trace"
    assert len(ends) > 6
    for num_bytes in range(len(data) - LAST_BYTES, len(data) + 1):
        cut.write_bytes(data[:num_bytes])
        num_whole = sum(end <= num_bytes for end in ends[1:])
        trace = open_trace(cut)
        assert sum(1 for _ in trace.frames()) == num_whole, num_bytes
        if num_bytes % 64 == 0:
            assert len(list(trace.passes())) == num_whole


def test_no_flipped_bit_of_a_file_goes_unnoticed(tmp_path: Path) -> None:
    written = writer(tmp_path)
    written.add(rich_pass(0))
    path = tmp_path / FIRST
    data = path.read_bytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with pytest.raises(TraceError, match=FIRST):
            list(open_trace(path).passes())


def test_a_disk_without_room_stops_the_trace_and_not_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "t")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    state, num_passes, num_bytes = done.stdout.split()
    assert state == "stopped"
    assert done.stderr.count("trace stopped, serving goes on") == 1
    assert "File too large" in done.stderr
    assert len(list(open_trace(tmp_path / "t").passes())) == int(num_passes) < 40
    assert int(num_bytes) == (tmp_path / "t" / FIRST).stat().st_size


def test_a_folder_without_room_at_the_start_is_named(tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib\n"
        "from tests.trace.world import writer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "writer(pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "trace folder" in done.stderr
    assert "cannot be written (File too large)" in done.stderr
