"""What the runtime hands to the trace of tokens: in sampled passes the very rows it counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_moelb.config import Config
from sglang_moelb.ep import points
from sglang_moelb.ep.modality import DECODES, PLAIN, Requests, RowWindow
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.token_trace import MAX_PENDING, TokenTrace
from sglang_moelb.trace.tokens import TokenWriter, open_tokens
from sglang_moelb.trace.types import TokenPass
from sglang_moelb.types import Lever

from .layers import TOPK, layer_input, topology
from .test_runtime import (
    NUM_RANKS,
    PREFILL,
    START,
    Agreeing,
    Clock,
    Dispatcher,
    Mirroring,
    TopK,
)

NUM_LAYERS = 2
EVERY = 3


class World:
    """A runtime of two layers whose trace of tokens goes to `folder`."""

    def __init__(self, folder: Path, every: int = EVERY) -> None:
        self.folder = folder
        self.topology = replace(topology(NUM_RANKS), num_layers=NUM_LAYERS)
        self.dispatchers = [Dispatcher() for _ in range(NUM_LAYERS)]
        self.clock = Clock()
        self.trace = self._trace(every) if every else None
        seat = Seat(
            topology=self.topology,
            rank=0,
            device=torch.device("cpu"),
            window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
            layer_of_dispatcher={id(one): i for i, one in enumerate(self.dispatchers)},
            scoring=("softmax",) * NUM_LAYERS,
            form="hook",
        )
        for seam in SEAMS:
            points.num_passed[seam.name] += 1
        self.runtime = Runtime(
            seat, START, Agreeing(), Mirroring(), self.clock, self.trace  # type: ignore[arg-type]
        )

    def _trace(self, every: int) -> TokenTrace:
        writer = TokenWriter(
            self.folder, topology=self.topology, rank=0, config=Config(), every=every
        )
        return TokenTrace(writer, every, torch.device("cpu"))

    def serve(self, requests: Requests = PREFILL, num_tokens: int = 40, seed: int = 0) -> None:
        """One pass; the first 7 tokens are vision."""
        batch = SimpleNamespace(input_ids=torch.zeros(num_tokens, dtype=torch.int64))
        batch.input_ids[:7] = 1_000_000
        batch.moelb_requests = requests
        self.runtime.begin_pass(batch)
        for layer, dispatcher in enumerate(self.dispatchers):
            routed = layer_input(num_tokens, seed=seed + layer)
            output = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
            self.runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
            self.runtime.run_experts(None, None)
            self.runtime.after_experts()
            self.runtime.after_combine()
        self.runtime.end_pass()

    def traced(self) -> list[TokenPass]:
        """All that was written; ends the trace."""
        assert self.trace is not None
        self.trace.close()
        return list(open_tokens(self.folder).passes())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)
    points.detach()


@pytest.mark.parametrize("lever", [Lever.NONE, Lever.DROP, Lever.EXPAND])
def test_ids_agree_exactly_with_the_counts_of_the_same_pass(world: World, lever: Lever) -> None:
    world.clock.lever = lever
    for seed in range(EVERY + 1):
        world.serve(seed=seed)
    found = world.traced()
    records = {record.step: record for record in world.clock.records}
    assert [one.step for one in found] == [0, EVERY]
    for one in found:
        record = records[one.step]
        assert one.lever == record.used_lever.name.lower() == lever.name.lower()
        rows_LEM = one.rows_LEM(world.topology.num_experts)
        assert (NUM_RANKS * rows_LEM == record.rows_LEM).all()
        assert rows_LEM.sum() == NUM_LAYERS * 40 * TOPK


def test_weights_and_flags_are_the_routers_and_the_batchs(world: World) -> None:
    protects = Requests(runs=((30, PLAIN), (10, DECODES)), phase="prefill")
    world.serve(protects, seed=5)
    (one,) = world.traced()
    for layer in range(NUM_LAYERS):
        routed = layer_input(40, seed=5 + layer)
        assert (one.ids_LTK[layer] == routed.ids_TK.numpy()).all()
        assert (one.weights_LTK[layer] == routed.weights_TK.half().numpy()).all()
    assert one.is_vision_T.tolist() == [True] * 7 + [False] * 33
    assert one.is_protected_T.tolist() == [False] * 30 + [True] * 10


def test_decode_passes_are_neither_sampled_nor_counted_for_sampling(world: World) -> None:
    for _ in range(EVERY):
        world.serve()
        for _ in range(2):
            world.serve(Requests(runs=((40, DECODES),), phase="decode"))
    world.serve()
    assert [one.step for one in world.traced()] == [0, 3 * EVERY]


def test_passes_that_are_not_sampled_keep_nothing(world: World) -> None:
    kept: list[Any] = []
    added = world.trace.add  # type: ignore[union-attr]

    def add(log: Any, flags_T: torch.Tensor) -> None:
        kept.append(log.step)
        added(log, flags_T)

    world.trace.add = add  # type: ignore[union-attr, method-assign]
    for _ in range(2 * EVERY):
        world.serve()
    assert kept == [0, EVERY]


def test_without_the_flag_nothing_is_kept_or_written(tmp_path: Path) -> None:
    world = World(tmp_path, every=0)
    world.serve()
    assert list(tmp_path.iterdir()) == []
    assert world.runtime.status()["trace_tokens"] == "off"
    points.detach()


def test_the_ids_outlive_what_sglang_does_to_its_tensors(world: World) -> None:
    routed = layer_input(40, seed=1)
    ids_TK = routed.ids_TK.int()
    batch = SimpleNamespace(
        input_ids=torch.zeros(40, dtype=torch.int64), moelb_requests=PREFILL
    )
    world.runtime.begin_pass(batch)
    for dispatcher in world.dispatchers:
        output = TopK(routed.weights_TK, ids_TK, routed.logits_TE)
        world.runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
    world.runtime.end_pass()
    ids_TK.fill_(0)
    (one,) = world.traced()
    assert (one.ids_LTK[0] == routed.ids_TK.numpy()).all()


def test_a_slow_disk_leaves_passes_out_and_counts_them(tmp_path: Path) -> None:
    import threading

    world = World(tmp_path, every=1)
    assert world.trace is not None
    writer = world.trace.background._writer
    go, add = threading.Event(), writer.add

    def held(item: Any) -> None:
        go.wait()
        add(item)

    writer.add = held  # type: ignore[method-assign]
    for _ in range(MAX_PENDING + 4):
        world.serve()
    missed = world.trace.stats.num_missed
    assert missed in (3, 4)
    go.set()
    while world.trace.background._inbox.qsize():
        pass
    world.serve()
    found = world.traced()
    assert found[-1].num_missed == missed == sum(one.num_missed for one in found)
    assert len(found) + missed == MAX_PENDING + 5
    points.detach()


def test_the_status_tells_that_the_trace_has_stopped(world: World) -> None:
    assert world.runtime.status()["trace_tokens"] == "running"
    world.trace.background._writer.stopped = "no space left"  # type: ignore[union-attr]
    assert world.runtime.status()["trace_tokens"] == "stopped"


def test_a_rank_without_tokens_takes_its_pass(world: World) -> None:
    world.clock.lever = Lever.NONE
    world.serve(Requests(runs=(), phase="prefill"), num_tokens=0)
    (one,) = world.traced()
    assert one.ids_LTK.shape == (NUM_LAYERS, 0, TOPK)
    assert one.ids_LTK.dtype == np.int16
