"""Laws of the lever downgrade on one rank: slots and their events, and what the experts compute.

A layer here is a stand-in of SGLang's with real weights; its runner is the reference of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from sglang_moelb.ep.low import fp8
from sglang_moelb.ep.low.flags import HostFlags
from sglang_moelb.ep.low.lanes import HostLanes
from sglang_moelb.ep.low.lever import DowngradeLever
from sglang_moelb.ep.low.staging import Staging
from sglang_moelb.ep.standin.experts import run_experts
from sglang_moelb.ep.standin.low_experts import Fp8Experts, run_experts_fp8

E_LOCAL, HIDDEN, INNER, TOPK = 4, 128, 256, 2
CPU = torch.device("cpu")


class Dispatched(NamedTuple):
    """SGLang's output of DeepEP's dispatch."""

    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    num_recv_tokens_per_expert: list[int]


class Combined(NamedTuple):
    """SGLang's input of DeepEP's combine."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class Layer:
    """A MoE layer with its quant method and runner in one."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.w13_weight = torch.nn.Parameter(
            0.1 * torch.randn(E_LOCAL, 2 * INNER, HIDDEN, generator=generator).bfloat16()
        )
        self.w2_weight = torch.nn.Parameter(
            0.1 * torch.randn(E_LOCAL, HIDDEN, INNER, generator=generator).bfloat16()
        )
        self.quant_method = self
        self.runner = self
        self.calls: list[str] = []

    @torch.no_grad()
    def apply(self, layer: Layer, dispatch_output: Dispatched) -> Combined:
        """SGLang's own way."""
        assert layer is self
        self.calls.append("high")
        out = run_experts(
            dispatch_output.hidden_states,
            dispatch_output.topk_ids,
            dispatch_output.topk_weights,
            self.w13_weight,
            self.w2_weight,
        )
        return Combined(out, dispatch_output.topk_ids, dispatch_output.topk_weights)

    def run(self, dispatch_output: Dispatched, quant_info: Any) -> Combined:
        """The runner with the weights it is given."""
        assert quant_info.use_fp8
        assert quant_info.block_shape == [128, 128]
        self.calls.append("low")
        assert dispatch_output.hidden_states_scale is not None
        out = run_experts_fp8(
            dispatch_output.hidden_states,
            dispatch_output.hidden_states_scale,
            dispatch_output.topk_ids,
            dispatch_output.topk_weights,
            Fp8Experts(
                w13_eJH=quant_info.w13_weight,
                w13_scale=quant_info.w13_scale,
                w2_eHI=quant_info.w2_weight,
                w2_scale=quant_info.w2_scale,
            ),
        )
        return Combined(out, dispatch_output.topk_ids, dispatch_output.topk_weights)


@pytest.fixture(autouse=True)
def quant_info(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of SGLang's that holds the class need not be importable here."""
    pytest.importorskip("sglang.srt.layers.moe.moe_runner.deep_gemm")


def received(seed: int, num_rows: int = 50) -> Dispatched:
    """Rows for this rank, some with one local expert only."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [torch.randperm(E_LOCAL, generator=generator)[:TOPK] for _ in range(num_rows)]
    ).view(num_rows, TOPK)
    ids[::3, 1] = -1
    counts = torch.bincount(ids[ids >= 0], minlength=E_LOCAL)
    return Dispatched(
        torch.randn(num_rows, HIDDEN, generator=generator).bfloat16(),
        None,
        ids,
        torch.rand(num_rows, TOPK, generator=generator),
        [-(-n // 128) * 128 for n in counts.tolist()],
    )


def made(
    layers: list[Layer], *, num_slots: int = 2, resident: tuple[int, ...] = (), rank: int = 0
) -> DowngradeLever:
    staging = Staging(layers, num_slots=num_slots, resident=resident, lanes=HostLanes())
    return DowngradeLever(layers, rank, staging, HostFlags(E_LOCAL, CPU))


def plan(*low: int, rank: int = 0, num_ranks: int = 2) -> torch.Tensor:
    low_E = torch.zeros(num_ranks * E_LOCAL, dtype=torch.int32)
    low_E[rank * E_LOCAL : (rank + 1) * E_LOCAL] = torch.tensor(low, dtype=torch.int32)
    return low_E


def in_fp8(layer: Layer, rows: Dispatched) -> torch.Tensor:
    """The layer wholly in float8, straight from its weights."""
    weights = fp8.allocate(layer)
    fp8.convert(layer, weights, torch.ones(E_LOCAL, dtype=torch.int32))
    return fp8.run(layer, fp8.quantised(rows), weights).hidden_states


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("resident", [(), (0,)])
def test_a_lowered_rank_computes_in_float8_close_to_bfloat16_and_not_equal(
    rank: int, resident: tuple[int, ...]
) -> None:
    layer, rows = Layer(1), received(2)
    downgrade = made([layer], rank=rank, resident=resident)
    downgrade.prepare(0, plan(1, 1, 1, 1, rank=rank))
    out = downgrade.run(layer, rows)
    assert torch.equal(out.hidden_states, in_fp8(layer, rows))
    exact = layer.apply(layer, rows).hidden_states.float()
    error = (out.hidden_states.float() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.08
    assert torch.equal(out.topk_ids, rows.topk_ids)
    assert out.hidden_states.dtype == rows.hidden_states.dtype
    assert downgrade.told() == {"format": "fp8", "num_low_layers": 1, "num_host_waits": 0}


@pytest.mark.parametrize("low_E", [plan(0, 0, 0, 0), plan(1, 1, 1, 1, rank=1)])
def test_a_rank_that_is_not_asked_leaves_the_layer_to_sglang(low_E: torch.Tensor) -> None:
    layer = Layer(1)
    downgrade = made([layer])
    downgrade.prepare(0, low_E)
    assert downgrade.run(layer, received(2)) is None
    assert downgrade.told()["num_low_layers"] == 0
    assert layer.calls == []


def test_without_a_plan_or_for_another_layer_sglang_runs() -> None:
    layer, stranger = Layer(1), Layer(2)
    downgrade = made([layer])
    assert downgrade.run(layer, received(2)) is None
    downgrade.prepare(0, plan(1, 1, 1, 1))
    assert downgrade.run(stranger, received(2)) is None
    downgrade.prepare(0, plan(1, 1, 1, 1))
    downgrade.forget()
    assert downgrade.run(layer, received(2)) is None
    assert layer.calls == []


def test_mixed_experts_run_each_in_its_own_precision_and_add_up() -> None:
    layer, rows = Layer(1), received(2)
    downgrade = made([layer])
    downgrade.prepare(0, plan(1, 0, 1, 0))
    out = downgrade.run(layer, rows)
    assert layer.calls == ["high", "low"]
    assert torch.equal(out.topk_ids, rows.topk_ids)
    is_low = torch.isin(rows.topk_ids, torch.tensor([0, 2]))
    high = layer.apply(layer, rows._replace(topk_ids=rows.topk_ids.where(~is_low, -1)))
    low = in_fp8(layer, rows._replace(topk_ids=rows.topk_ids.where(is_low, -1)))
    assert torch.equal(out.hidden_states, high.hidden_states + low)


@pytest.mark.parametrize("kept", [0, 2])
def test_experts_without_rows_cost_no_run(kept: int) -> None:
    """One low expert with all the rows is a low rank; one without any is SGLang's."""
    layer, rows = Layer(1), received(2)
    rows = rows._replace(
        topk_ids=torch.full_like(rows.topk_ids, -1), num_recv_tokens_per_expert=[0] * E_LOCAL
    )
    rows.topk_ids[:, 0] = kept
    rows.num_recv_tokens_per_expert[kept] = 128
    downgrade = made([layer])
    downgrade.prepare(0, plan(1, 0, 0, 0))
    out = downgrade.run(layer, rows)
    assert (out is None) == (kept == 2)
    assert layer.calls == ([] if out is None else ["low"])


def test_only_wanted_experts_are_converted() -> None:
    layers = [Layer(1), Layer(2)]
    staging = Staging(layers, num_slots=1, resident=(), lanes=HostLanes())
    staging.convert(0, torch.tensor([1, 1, 1, 1], dtype=torch.int32))
    before = staging.ready(0).w13.clone()
    staging.convert(1, torch.tensor([0, 1, 0, 0], dtype=torch.int32))
    after = staging.ready(1).w13
    same_e = [torch.equal(a.float(), b.float()) for a, b in zip(before, after, strict=True)]
    assert same_e == [True, False, True, True]


def test_the_slot_of_another_layer_is_never_taken_for_this_ones() -> None:
    layers = [Layer(seed) for seed in range(5)]
    for num_slots in (1, 2):
        downgrade = made(layers, num_slots=num_slots, resident=(2,))
        for _ in range(2):
            for number, layer in enumerate(layers):
                rows = received(number)
                downgrade.prepare(number, plan(1, 1, 1, 1))
                out = downgrade.run(layer, rows)
                assert torch.equal(out.hidden_states, in_fp8(layer, rows))
    staging = Staging(layers, num_slots=2, resident=(), lanes=HostLanes())
    staging.convert(0, torch.ones(E_LOCAL, dtype=torch.int32))
    with pytest.raises(AssertionError, match="slot holds layer 0, asked for 2"):
        staging.ready(2)


def test_memory_is_that_of_the_slots_and_of_the_copies_that_are_kept() -> None:
    layers = [Layer(seed) for seed in range(3)]
    one = fp8.allocate(layers[0]).num_bytes
    weights = sum(w.numel() for w in (layers[0].w13_weight, layers[0].w2_weight))
    assert one == weights + weights // 128**2 * 4
    staging = Staging(layers, num_slots=2, resident=(0, 2), lanes=HostLanes())
    assert (staging.staging_bytes, staging.resident_bytes) == (2 * one, 2 * one)


class ClockedLanes:
    """Two lanes with vector clocks: what is sure to have happened before what."""

    def __init__(self) -> None:
        self.clocks = {"main": {"main": 0, "side": 0}, "side": {"main": 0, "side": 0}}
        self.lane = "main"

    def step(self) -> dict[str, int]:
        """A piece of work in the current lane; its time."""
        clock = self.clocks[self.lane]
        clock[self.lane] += 1
        return dict(clock)

    def _join(self, lane: str, event: dict[str, int]) -> None:
        clock = self.clocks[lane]
        self.clocks[lane] = {name: max(clock[name], event[name]) for name in clock}

    def mark(self) -> dict[str, int]:
        return dict(self.clocks["main"])

    @contextmanager
    def aside(self, after: tuple[Any, ...]) -> Iterator[None]:
        for event in after:
            self._join("side", event)
        self.lane = "side"
        yield
        self.lane = "main"

    def mark_aside(self) -> dict[str, int]:
        return dict(self.clocks["side"])

    def wait(self, event: dict[str, int]) -> None:
        self._join("main", event)


def before(a: dict[str, int], b: dict[str, int]) -> bool:
    return a != b and all(a[lane] <= b[lane] for lane in a)


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("forgotten", ["nothing", "reads", "writes"])
def test_a_slot_is_rewritten_only_after_its_last_read_and_read_only_after_its_write(
    monkeypatch: pytest.MonkeyPatch, num_slots: int, forgotten: str
) -> None:
    lanes = ClockedLanes()
    layers = [Layer(seed) for seed in range(4)]
    staging = Staging(layers, num_slots=num_slots, resident=(), lanes=lanes)
    writes: list[tuple[int, dict[str, int]]] = []
    reads: list[tuple[int, dict[str, int]]] = []
    monkeypatch.setattr(
        fp8, "convert", lambda layer, into, *a: writes.append((id(into), lanes.step()))
    )
    if forgotten == "writes":
        monkeypatch.setattr(lanes, "wait", lambda event: None)
    if forgotten == "reads":
        monkeypatch.setattr(lanes, "mark", lambda: {"main": 0, "side": 0})
    for _ in range(3):
        for number in range(len(layers)):
            lanes.step()  # the plan
            staging.convert(number, torch.ones(E_LOCAL, dtype=torch.int32))
            weights = staging.ready(number)
            reads.append((id(weights), lanes.step()))
            staging.done(number)
    ordered = all(
        before(w, r) or before(r, w) for slot, w in writes for other, r in reads if slot == other
    )
    assert ordered == (forgotten == "nothing")
