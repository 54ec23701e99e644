"""What was written is read back, whole, in order, and in few bytes."""

from __future__ import annotations

import threading
import zlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moelb.config import Config
from sglang_moelb.trace import codec
from sglang_moelb.trace.background import MAX_PENDING, BackgroundWriter
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.trace.synthetic import SyntheticLoad, synthesise_trace, synthetic_passes
from sglang_moelb.trace.types import ConfigChange, TracedPass
from sglang_moelb.types import Topology
from tests.trace.world import LOAD, TOPOLOGY, assert_same, rich_pass, writer


def test_a_pass_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    written = [rich_pass(step) for step in range(3)]
    with_none = replace(written[1], decision=None)
    trace_writer = writer(tmp_path)
    for traced in (*written, with_none):
        trace_writer.add(traced)
    trace_writer.close()
    found = list(open_trace(tmp_path).passes())
    assert len(found) == 4
    for one, other in zip((*written, with_none), found, strict=True):
        assert_same(one, other)


def test_numbers_of_numpy_are_read_back_as_plain_ones() -> None:
    one = rich_pass()
    assert one.decision is not None
    decision = replace(one.decision, expected_gain=np.float64(0.25))
    payload = codec.encode_pass(replace(one, decision=decision, num_missed=np.int64(4)), TOPOLOGY)
    found = codec.decode_pass(payload, TOPOLOGY)
    assert found.decision is not None
    assert type(found.decision.expected_gain) is float
    assert (found.decision.expected_gain, found.num_missed) == (0.25, 4)


def test_a_change_of_configuration_keeps_its_place_and_begins_the_next_file(tmp_path: Path) -> None:
    changed = Config(mode="drop")
    trace_writer = writer(tmp_path, max_file_bytes=1)
    trace_writer.add(rich_pass(0))
    trace_writer.reconfigure(changed)
    trace_writer.add(rich_pass(1))
    trace_writer.close()
    events = list(open_trace(tmp_path).events())
    assert [type(e) for e in events] == [TracedPass, ConfigChange, TracedPass]
    assert events[1] == ConfigChange(config=changed)
    last = sorted(tmp_path.iterdir())[-1]
    assert open_trace(last).config == changed


def test_rotation_loses_no_pass_and_keeps_files_small(tmp_path: Path) -> None:
    load = replace(LOAD, num_passes=20)
    synthesise_trace(tmp_path, load, max_file_bytes=4000)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 2
    assert max(sizes) <= 4000
    steps = [traced.record.step for traced in open_trace(tmp_path).passes()]
    assert steps == list(range(20))


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    trace_writer = writer(tmp_path)
    for step in range(3):
        trace_writer.add(rich_pass(step))
        assert len(list(open_trace(tmp_path).passes())) == step + 1


def test_ranks_are_read_apart(tmp_path: Path) -> None:
    for rank, num_passes in ((1, 1), (3, 2)):
        trace_writer = writer(tmp_path, rank=rank)
        for step in range(num_passes):
            trace_writer.add(rich_pass(step))
    assert len(list(open_trace(tmp_path).passes())) == 1
    assert len(list(open_trace(tmp_path, rank=3).passes())) == 2


@pytest.mark.parametrize("tokens_per_rank", [4096, 65536])
def test_a_layer_takes_at_most_two_kilobytes(tokens_per_rank: int) -> None:
    topology = Topology(num_layers=8, num_experts=128, num_ranks=4, topk=8)
    load = SyntheticLoad(topology=topology, num_passes=1, tokens_per_rank=tokens_per_rank)
    num_bytes = len(codec.encode_pass(next(synthetic_passes(load)), topology))
    assert num_bytes <= 2048 * topology.num_layers


@given(st.lists(st.integers(0, 2**62), max_size=20))
def test_planes_give_back_the_integers(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    assert codec.from_planes(codec.to_planes(array), (len(values),)).tolist() == values


def test_planes_are_the_lowest_bytes_first() -> None:
    assert codec.to_planes(np.array([1, 258])) == bytes([2, 1, 2, 0, 1])
    assert codec.to_planes(np.zeros(9, dtype=np.int64)) == bytes([0])


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, found -1"):
        codec.to_planes(np.array([3, -1]))


def test_a_background_writer_writes_all_that_it_took(tmp_path: Path) -> None:
    background = BackgroundWriter(writer(tmp_path))
    for step in range(MAX_PENDING // 2):
        background.add(replace(rich_pass(step), num_missed=0))
    background.reconfigure(Config(mode="drop"))
    background.close()
    events = list(open_trace(tmp_path).events())
    assert len(events) == MAX_PENDING // 2 + 1
    assert isinstance(events[-1], ConfigChange)


def test_a_background_writer_counts_what_it_leaves_out(tmp_path: Path) -> None:
    trace_writer = writer(tmp_path)
    slow = trace_writer.add
    go = threading.Event()

    def held(traced: TracedPass) -> None:
        go.wait()
        slow(traced)

    trace_writer.add = held  # type: ignore[method-assign]
    background = BackgroundWriter(trace_writer)
    for step in range(MAX_PENDING + 5):
        background.add(rich_pass(step))
    go.set()
    while background._inbox.qsize():
        pass
    background.add(rich_pass(999))
    background.close()
    passes = list(open_trace(tmp_path).passes())
    assert len(passes) + sum(p.num_missed for p in passes) == MAX_PENDING + 6
    assert passes[-1].num_missed in (4, 5)


def test_the_sizes_of_the_server_come_back(tmp_path: Path) -> None:
    writer(tmp_path).close()
    assert open_trace(tmp_path).header.topology == TOPOLOGY


def test_a_pass_that_does_not_tell_refused_tokens_apart_is_read_as_if_all_protected_were() -> None:
    one = rich_pass()
    fields = msgspec.msgpack.decode(zlib.decompress(codec.encode_pass(one, TOPOLOGY)))
    del fields["num_refused_tokens"]
    found = codec.decode_pass(zlib.compress(msgspec.msgpack.encode(fields)), TOPOLOGY).record
    assert found.num_protected_tokens_R.tolist() == one.record.num_protected_tokens_R.tolist()
    assert found.num_refused_tokens_R.tolist() == one.record.num_protected_tokens_R.tolist()
    assert found.num_refused_tokens_R.tolist() != one.record.num_refused_tokens_R.tolist()
