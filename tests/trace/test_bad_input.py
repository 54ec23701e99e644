"""Cut, damaged, foreign and future traces, and folders that cannot be written."""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from io import FileIO
from pathlib import Path

import msgspec
import pytest

from sglang_moelb.trace import frames
from sglang_moelb.trace.codec import decode_header, encode_header
from sglang_moelb.trace.frames import HEAD_BYTES, PREAMBLE, Kind
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.types import PASSES, TraceError
from sglang_moelb.types import Topology
from tests.trace.world import FIRST, rich_pass, writer


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    trace_writer = writer(tmp_path / "whole")
    for step in range(3):
        trace_writer.add(rich_pass(step))
    trace_writer.close()
    return tmp_path / "whole" / FIRST


def frame_starts(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [frame.start for frame in frames.frames(path, file)]


def test_a_file_cut_at_any_byte_gives_the_passes_before_the_cut(whole: Path) -> None:
    data, starts = whole.read_bytes(), frame_starts(whole)
    cut = whole.with_name("cut.trace")
    for num_bytes in [*range(starts[1], starts[-1], 37), *range(starts[-1], len(data))]:
        cut.write_bytes(data[:num_bytes])
        ends = [*starts[2:], len(data)]
        num_whole = sum(end <= num_bytes for end in ends)
        assert len(list(open_trace(cut).passes())) == num_whole, num_bytes


def test_a_file_cut_within_its_header_says_that_nothing_is_there_yet(whole: Path) -> None:
    data, starts = whole.read_bytes(), frame_starts(whole)
    for num_bytes in range(starts[1]):
        whole.write_bytes(data[:num_bytes])
        with pytest.raises(TraceError, match="nothing traced yet"):
            open_trace(whole)


def test_every_flipped_bit_is_found(whole: Path) -> None:
    data, starts = whole.read_bytes(), frame_starts(whole)
    for at in range(starts[-1], len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        whole.write_bytes(flipped)
        with pytest.raises(TraceError, match=f"damaged at byte {starts[-1]}.*truncate -s"):
            list(open_trace(whole).passes())


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"PK\x03\x04 and more than twelve bytes")
    with pytest.raises(TraceError, match=r"data.bin: not a trace of sglang_moelb"):
        open_trace(path)


def test_a_later_version_is_named(whole: Path) -> None:
    data = whole.read_bytes()
    whole.write_bytes(PREAMBLE.pack(frames.MAGIC, 9) + data[PREAMBLE.size :])
    with pytest.raises(TraceError, match=r"trace format 9; .* reads 1"):
        open_trace(whole)


def test_another_schema_is_named(whole: Path) -> None:
    data, starts = whole.read_bytes(), frame_starts(whole)
    header = decode_header(data[starts[0] + HEAD_BYTES : starts[1]])
    other = encode_header(msgspec.structs.replace(header, schema="of.another"))
    whole.write_bytes(frames.preamble() + frames.frame(Kind.HEADER, other))
    with pytest.raises(TraceError, match=r"'of.another', not 'sglang_moelb.passes'"):
        open_trace(whole)


def test_passes_of_other_sizes_are_refused(whole: Path, tmp_path: Path) -> None:
    data, starts = whole.read_bytes(), frame_starts(whole)
    header = decode_header(data[starts[0] + HEAD_BYTES : starts[1]])
    assert header.topology == Topology(num_layers=3, num_experts=8, num_ranks=4, topk=2)
    wrong = frames.frame(Kind.HEADER, encode_header(msgspec.structs.replace(header, num_ranks=2)))
    whole.write_bytes(frames.preamble() + wrong + data[starts[1] :])
    with pytest.raises(TraceError, match="cannot be understood"):
        list(open_trace(whole).passes())


def test_a_missing_or_cut_file_between_others_is_named(tmp_path: Path) -> None:
    trace_writer = writer(tmp_path, max_file_bytes=1)
    for step in range(3):
        trace_writer.add(rich_pass(step))
    trace_writer.close()
    files = sorted(tmp_path.iterdir())
    middle = files[2].read_bytes()
    files[2].write_bytes(middle[:-1])
    with pytest.raises(TraceError, match=r"00002.trace: cut short.*00003.trace follows"):
        list(open_trace(tmp_path).passes())
    files[2].unlink()
    with pytest.raises(TraceError, match=r"00003.trace: not the file that follows"):
        list(open_trace(tmp_path).passes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), r"holds no rank-\*.trace file"),
    ],
)
def test_a_place_without_a_trace_is_named(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "place")  # type: ignore[operator]
    with pytest.raises(TraceError, match=message):
        open_trace(tmp_path / "place")


def test_a_rank_without_a_trace_is_named(tmp_path: Path) -> None:
    writer(tmp_path).close()
    with pytest.raises(TraceError, match="no trace of rank-007; it has rank-000"):
        open_trace(tmp_path, rank=7)


def test_two_servers_cannot_trace_into_one_folder(tmp_path: Path) -> None:
    writer(tmp_path)
    before = (tmp_path / FIRST).read_bytes()
    with pytest.raises(TraceError, match=r"a trace of rank 0 already.*a folder of its own"):
        writer(tmp_path)
    assert (tmp_path / FIRST).read_bytes() == before


def test_a_folder_with_any_file_of_the_rank_is_taken(tmp_path: Path) -> None:
    (tmp_path / PASSES.file_name(0, 7)).write_bytes(b"")
    with pytest.raises(TraceError, match="a trace of rank 0 already"):
        writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PASSES.file_name(0, 7)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"trace folder .*cannot be written"):
        writer(tmp_path / "file" / "folder")


class _FullDisk:
    """A file that takes `room` more bytes and then is full, like a disk."""

    def __init__(self, file: FileIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_bytes = self._file.write(data[: self._room])
        self._room -= num_bytes
        return num_bytes

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_a_full_disk_stops_the_trace_once_and_leaves_whole_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace_writer = writer(tmp_path)
    trace_writer.add(rich_pass(0))
    trace_writer._file = _FullDisk(trace_writer._file, room=40)  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR, logger="sglang_moelb"):
        for step in range(1, 4):
            trace_writer.add(rich_pass(step))
    assert "No space left on device" in trace_writer.stopped
    assert len(caplog.records) == 1
    data = (tmp_path / FIRST).read_bytes()
    assert len(list(open_trace(tmp_path).passes())) == 1
    assert frame_starts(tmp_path / FIRST)[-1] < len(data)
    with (tmp_path / FIRST).open("rb") as file:
        assert [f.end for f in frames.frames(tmp_path / FIRST, file)][-1] == len(data)


def test_a_full_disk_at_rotation_keeps_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_writer = writer(tmp_path, max_file_bytes=1 << 20)
    trace_writer.add(rich_pass(0))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trace_writer, "_begin", full)
    monkeypatch.setattr(trace_writer, "_max_file_bytes", 1)
    trace_writer.add(rich_pass(1))
    assert trace_writer.stopped
    assert len(list(open_trace(tmp_path).passes())) == 1


def test_a_pass_of_other_sizes_stops_the_trace_and_not_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace_writer = writer(tmp_path)
    good = rich_pass(0)
    trace_writer.add(good)
    with caplog.at_level(logging.ERROR, logger="sglang_moelb"):
        trace_writer.add(replace(good, rows_LREM=good.rows_LREM[:2]))
        trace_writer.add(good)
    assert "rows_LREM is (2, 4, 8, 2), expected (3, 4, 8, 2)" in trace_writer.stopped
    assert len(caplog.records) == 1
    assert len(list(open_trace(tmp_path).passes())) == 1


def test_a_killed_writer_leaves_every_pass_that_it_had_added(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from tests.trace.world import rich_pass, writer\n"
        "trace_writer = writer(pathlib.Path(sys.argv[1]))\n"
        "for step in range(5):\n"
        "    trace_writer.add(rich_pass(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    steps = [traced.record.step for traced in open_trace(tmp_path / "t").passes()]
    assert steps == list(range(5))
