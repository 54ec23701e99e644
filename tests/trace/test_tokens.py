"""Traces of tokens: read back as written, cut, damaged, full disks, and two in one folder."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sglang_moelb.config import Config
from sglang_moelb.trace import frames
from sglang_moelb.trace.background import BackgroundWriter
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.tokens import TokenWriter, decode_tokens, encode_tokens, open_tokens
from sglang_moelb.trace.types import TOKENS, PendingTokens, TokenPass, TraceError
from sglang_moelb.types import Topology
from tests.trace.world import writer as passes_writer

TOPOLOGY = Topology(num_layers=3, num_experts=256, num_ranks=4, topk=2)
FIRST = TOKENS.file_name(0, 0)


def token_pass(step: int = 0, num_rows: int = 40) -> TokenPass:
    """Random routing in which nothing is 0 throughout; the last row is padding."""
    rng = np.random.default_rng(step)
    shape = (TOPOLOGY.num_layers, num_rows, TOPOLOGY.topk)
    ids_LTK = rng.integers(0, TOPOLOGY.num_experts, size=shape).astype(np.int16)
    ids_LTK[:, num_rows - 1 :] = -1
    return TokenPass(
        step=step,
        lever="drop",
        ids_LTK=ids_LTK,
        weights_LTK=rng.random(shape).astype(np.float16),
        is_vision_T=rng.random(num_rows) < 0.5,
        is_protected_T=rng.random(num_rows) < 0.2,
    )


def token_writer(folder: Path, rank: int = 0, max_file_bytes: int = 1 << 20) -> TokenWriter:
    return TokenWriter(
        folder,
        topology=TOPOLOGY,
        rank=rank,
        config=Config(),
        every=2,
        max_file_bytes=max_file_bytes,
    )


def pending(step: int, num_missed: int = 0) -> PendingTokens:
    return PendingTokens(build=lambda: token_pass(step), num_missed=num_missed)


def assert_same(one: TokenPass, other: TokenPass) -> None:
    for name in one.__dataclass_fields__:
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            assert left.shape == right.shape, name
            assert (left == right).all(), name
        else:
            assert left == right, name


def test_tokens_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    written = token_writer(tmp_path)
    for step in range(3):
        written.add(pending(step, num_missed=step))
    written.close()
    opened = open_tokens(tmp_path)
    assert opened.header.topology == TOPOLOGY
    assert opened.header.source == "live, one prefill pass of 2"
    found = list(opened.passes())
    assert len(found) == 3
    for step, one in enumerate(found):
        assert_same(one, replace(token_pass(step), num_missed=step))


def test_a_rank_without_rows_has_its_pass(tmp_path: Path) -> None:
    empty = token_pass(num_rows=1)
    empty = replace(
        empty,
        ids_LTK=empty.ids_LTK[:, :0],
        weights_LTK=empty.weights_LTK[:, :0],
        is_vision_T=empty.is_vision_T[:0],
        is_protected_T=empty.is_protected_T[:0],
    )
    written = token_writer(tmp_path)
    written.add(PendingTokens(build=lambda: empty))
    (found,) = open_tokens(tmp_path).passes()
    assert_same(found, empty)
    assert found.rows_LEM(TOPOLOGY.num_experts).sum() == 0


def test_rows_are_counted_by_expert_and_modality_without_padding() -> None:
    tokens = token_pass()
    rows_LEM = tokens.rows_LEM(TOPOLOGY.num_experts)
    for layer in range(TOPOLOGY.num_layers):
        expected = np.zeros((TOPOLOGY.num_experts, 2), dtype=int)
        for row in range(39):
            for expert in tokens.ids_LTK[layer, row]:
                expected[expert, int(tokens.is_vision_T[row])] += 1
        assert (rows_LEM[layer] == expected).all()
    assert rows_LEM.sum() == 3 * 39 * 2


def test_files_are_rotated_by_size_and_none_is_lost(tmp_path: Path) -> None:
    written = token_writer(tmp_path, max_file_bytes=3000)
    for step in range(12):
        written.add(pending(step))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 2
    assert sum(sizes) == written.num_bytes
    assert written.num_passes == 12
    assert [one.step for one in open_tokens(tmp_path).passes()] == list(range(12))


def test_tokens_and_passes_share_a_folder_and_are_not_taken_for_each_other(tmp_path: Path) -> None:
    passes_writer(tmp_path)
    token_writer(tmp_path)
    with pytest.raises(TraceError, match=r"not 'sglang_moelb.passes'; it is not a trace of passes"):
        open_trace(tmp_path / FIRST)
    with pytest.raises(TraceError, match=r"not 'sglang_moelb.tokens'; it is not a trace of tokens"):
        open_tokens(tmp_path / "rank-000.00000.trace")
    assert list(open_trace(tmp_path).passes()) == list(open_tokens(tmp_path).passes()) == []


def test_ranks_are_read_apart_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for rank in (0, 3):
        token_writer(tmp_path, rank=rank).add(pending(rank))
    assert [one.step for one in open_tokens(tmp_path, rank=3).passes()] == [3]
    with pytest.raises(TraceError, match="no trace of tokens-001; it has tokens-000, tokens-003"):
        open_tokens(tmp_path, rank=1)


def test_two_servers_cannot_trace_into_one_folder(tmp_path: Path) -> None:
    token_writer(tmp_path)
    before = (tmp_path / FIRST).read_bytes()
    with pytest.raises(TraceError, match=r"a trace of rank 0 already.*a folder of its own"):
        token_writer(tmp_path)
    assert (tmp_path / FIRST).read_bytes() == before


def test_a_file_that_is_cut_gives_the_passes_before_the_cut(tmp_path: Path) -> None:
    written = token_writer(tmp_path / "whole")
    for step in range(2):
        written.add(pending(step))
    path = tmp_path / "whole" / FIRST
    with path.open("rb") as file:
        ends = [frame.end for frame in frames.frames(path, file)]
    data = path.read_bytes()
    cut = tmp_path / "cut.trace"
    for num_bytes in [*range(ends[0], ends[1], 37), *range(ends[1] - 20, len(data) + 1, 3)]:
        cut.write_bytes(data[:num_bytes])
        found = list(open_tokens(cut).passes())
        assert len(found) == sum(end <= num_bytes for end in ends[1:]), num_bytes


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    written = token_writer(tmp_path)
    written.add(pending(0))
    path = tmp_path / FIRST
    data = path.read_bytes()
    for at in range(len(data) - 200, len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with pytest.raises(TraceError, match="damaged at byte"):
            list(open_tokens(path).passes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, "are not"),
        ({"topk": 3}, "are not"),
        ({"num_experts": 16}, r"expert \d+ of 16"),
    ],
)
def test_tokens_of_other_sizes_are_refused(change: dict[str, int], message: str) -> None:
    payload = encode_tokens(token_pass(), 0, TOPOLOGY)
    with pytest.raises(ValueError, match=message):
        decode_tokens(payload, replace(TOPOLOGY, **change))


def test_a_pass_of_other_sizes_stops_the_trace_and_not_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    background = BackgroundWriter(token_writer(tmp_path))
    good = token_pass()
    wrong = replace(good, ids_LTK=good.ids_LTK[:2])
    background.add(PendingTokens(build=lambda: good))
    with caplog.at_level(logging.ERROR, logger="sglang_moelb"):
        background.add(PendingTokens(build=lambda: wrong))
        background.add(PendingTokens(build=lambda: good))
        background.close()
    assert "ids_LTK is (2, 40, 2), expected (3, 40, 2)" in background.stopped
    assert background.stats.state == "stopped"
    assert len(caplog.records) == 1
    assert len(list(open_tokens(tmp_path).passes())) == 1


def test_a_killed_writer_leaves_every_pass_that_it_had_added(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from tests.trace.test_tokens import pending, token_writer\n"
        "written = token_writer(pathlib.Path(sys.argv[1]))\n"
        "for step in range(5):\n"
        "    written.add(pending(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [one.step for one in open_tokens(tmp_path / "t").passes()] == list(range(5))
