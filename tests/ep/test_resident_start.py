"""Laws of a start with a placement file: what it must fit, and what ends the start by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.flags import take_arguments
from sglang_moelb.ep.low import marlin_library
from sglang_moelb.ep.resident import attach, formats, refusals
from sglang_moelb.ep.resident.attach import ExpertMemory, attach_resident
from sglang_moelb.ep.resident.weights import StoredLayer
from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    LayerPlacement,
    Placement,
    RankMemory,
    Replica,
    Sizes,
    load,
    memory_of,
)
from sglang_moelb.types import Topology

from .moe_layers import lora, make_layer  # noqa: F401 - a fixture for all tests here
from .moe_layers import offload as no_offload  # noqa: F401 - the same

TOPOLOGY = Topology(num_layers=2, num_experts=8, num_ranks=2, topk=2)
WEIGHTS = 3 * 128 * 256
LAYER = LayerPlacement(replicas=(Replica(expert=0, rank=1),), low_experts=(1, 2, 4, 5))


def placement(layers: tuple[LayerPlacement, ...] = (LAYER, LAYER), **changes: Any) -> Placement:
    low = WEIGHTS + 4 * WEIGHTS // 128**2
    expert_bytes = ExpertBytes(high=2 * WEIGHTS, low=low)
    before, after = memory_of(layers, TOPOLOGY, expert_bytes)
    made = Placement(
        schema=SCHEMA, version=VERSION, format="fp8",
        sizes=Sizes(num_layers=2, num_experts=8, num_ranks=2, topk=2), expert_bytes=expert_bytes,
        layers=layers, memory=RankMemory(before=before, after=after),
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`start(placement, topology=..., spoil=...)`: what `attach_resident` answers or ends with."""
    layers = [make_layer() for _ in range(2)]
    server_args = SimpleNamespace(
        deepep_mode="normal", enable_memory_saver=False, cpu_offload_gb=0,
        expert_distribution_recorder_mode=None, enable_single_batch_overlap=False,
        disaggregation_mode="null",
    )  # fmt: skip
    monkeypatch.setattr(attach.low, "expert_layers", lambda model: layers)
    monkeypatch.setattr(attach, "_same_placement", lambda path, group: load(Path(path)))

    def begin(
        made: Placement,
        topology: Topology = TOPOLOGY,
        spoil: Callable[..., None] | None = None,
        **knobs: Any,
    ) -> Any:
        path = tmp_path / "p.json"
        path.write_bytes(made.to_json())
        if spoil:
            spoil(server_args, layers)
        config = merge(Config(), {"resident": {"placement": str(path), **knobs}})
        runner = SimpleNamespace(model=None, server_args=server_args)
        group = SimpleNamespace(cpu_group=None, device_group=None)
        return attach_resident(runner, config, topology, 0, group)

    return begin


def give_low_latency(layers: list[Any], **changes: Any) -> None:
    """A part of the dispatcher for low latency, as mode auto has it."""
    for layer in layers:
        inner = layer.dispatcher._inners[0]
        inner._low_latency_dispatcher = copy.copy(inner._normal_dispatcher)
        vars(inner._low_latency_dispatcher).update(changes)


def fp8_in_decode(server_args: Any, layers: list[Any]) -> None:
    dtype = SimpleNamespace(name="FP8")
    give_low_latency(layers, use_fp8=True, deepep_output_dtype=dtype)


def batch_overlap(server_args: Any, layers: list[Any]) -> None:
    server_args.enable_single_batch_overlap = True


def memory_saver(server_args: Any, layers: list[Any]) -> None:
    server_args.enable_memory_saver = True


def offload(server_args: Any, layers: list[Any]) -> None:
    server_args.cpu_offload_gb = 4


def quantised(server_args: Any, layers: list[Any]) -> None:
    layers[1].quant_method = SimpleNamespace()


WRONG: list[tuple[Any, list[str]]] = [
    (fp8_in_decode, ["dispatch of FP8", "--deepep-dispatcher-output-dtype bf16"]),
    (batch_overlap, ["--enable-single-batch-overlap", "leave the flag out"]),
    (memory_saver, ["--enable-memory-saver", "leave the flag out"]),
    (offload, ["--cpu-offload-gb", "leave the flag out"]),
    (quantised, ["quantised checkpoint"]),
]


@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_a_server_that_cannot_use_it_ends_by_name(
    start: Callable[..., Any], spoil: Any, expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        start(placement(), spoil=spoil)
    message = str(ended.value)
    assert message.startswith("sglang_moelb: resident.placement ")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("modes", ["normal", "both", "low latency"])
def test_deepep_sends_to_all_places_in_every_mode_that_the_server_has(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, modes: str
) -> None:
    stored = StoredLayer(num_high=2, num_low=3, low=None)
    monkeypatch.setattr(attach, "store", lambda *args, **kwargs: stored)
    found: list[Any] = []

    def give(server_args: Any, layers: list[Any]) -> None:
        if modes != "normal":
            give_low_latency(layers)
        inners = [layer.dispatcher._inners[0] for layer in layers]
        if modes == "low latency":
            for inner in inners:
                del inner._normal_dispatcher
        found.extend(mode for inner in inners for mode in vars(inner).values())

    start(placement(), spoil=give)
    assert len(found) == (4 if modes == "both" else 2)
    assert [mode.num_experts for mode in found] == [2 * (4 + 1)] * len(found)


def in_4_bits(layers: tuple[LayerPlacement, ...] = (LAYER, LAYER)) -> Placement:
    small = ExpertBytes(high=2 * WEIGHTS, low=WEIGHTS * 17 // 32)
    before, after = memory_of(layers, TOPOLOGY, small)
    memory = RankMemory(before=before, after=after)
    return placement(layers, format="mxfp4", expert_bytes=small, memory=memory)


def clamped(server_args: Any, layers: list[Any]) -> None:
    layers[0].quant_method.runner.config.swiglu_limit = 7.0


def odd(server_args: Any, layers: list[Any]) -> None:
    layers[:] = [make_layer(hidden=192, inner=128) for _ in layers]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (clamped, ["'swiglu_limit': 7.0", r"mxfp4 can only compute silu(gate) * up", "fp8"]),
        (odd, ["experts of shapes", "multiples of 128"]),
        (quantised, ["quantised checkpoint"]),
        (fp8_in_decode, ["dispatch of FP8"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_4_bit_experts_cannot_be_run_with_ends_the_start_by_name(
    start: Callable[..., Any], spoil: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil is odd:  # else it is refused for its bytes
        monkeypatch.setitem(refusals.LOW_BYTES, "mxfp4", lambda num_weights: WEIGHTS * 17 // 32)
    with pytest.raises(SystemExit) as ended:
        start(in_4_bits(), spoil=spoil)
    assert all(part in str(ended.value) for part in expected), ended.value


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, "capability 8.0"),
        ((10, 0), torch.bfloat16, "capability 10.0"),
        ((9, 0), torch.float16, "--dtype torch.float16"),
        ((9, 0), torch.bfloat16, "a host without nvcc"),
    ],
)
def test_a_gpu_that_marlin_is_not_used_on_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: Any, expected: str
) -> None:
    close_torchvision_gap()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(marlin_library, "_e2m1", lambda: "e2m1")
    monkeypatch.setattr(marlin_library, "_compiler", lambda: "")
    what, why = formats._gpu_refusal(torch.zeros(1, dtype=dtype)) or ("", "")
    assert expected in what
    assert "use" in why or "calibrate with --format fp8" in why


@pytest.mark.parametrize("moves", [False, True])
def test_4_bit_experts_take_their_bytes_and_the_room_of_one_that_moves(
    start: Callable[..., Any], one_rank: None, moves: bool
) -> None:
    low = WEIGHTS * 17 // 32
    _, memory = start(in_4_bits(), recalibrate=moves)
    assert memory.after == 2 * (2 * 2 * WEIGHTS + 3 * low) + moves * low


def test_another_topology_is_refused_with_both(start: Callable[..., Any]) -> None:
    other = Topology(num_layers=2, num_experts=8, num_ranks=4, topk=2)
    with pytest.raises(SystemExit, match=r"num_ranks=2.*this server has .*num_ranks=4"):
        start(placement(), topology=other)


def test_the_experts_of_another_model_are_refused(start: Callable[..., Any]) -> None:
    small = ExpertBytes(high=4000, low=2001)
    before, after = memory_of((LAYER, LAYER), TOPOLOGY, small)
    made = placement(expert_bytes=small, memory=RankMemory(before=before, after=after))
    with pytest.raises(SystemExit, match=r"experts of 2001 bytes in fp8.*calibrate with this"):
        start(made)


def test_experts_served_smaller_than_the_file_counts_are_refused_with_both_dtypes_bytes(
    start: Callable[..., Any],
) -> None:
    wide = ExpertBytes(high=4 * WEIGHTS, low=WEIGHTS + 4 * WEIGHTS // 128**2)
    before, after = memory_of((LAYER, LAYER), TOPOLOGY, wide)
    made = placement(expert_bytes=wide, memory=RankMemory(before=before, after=after))
    with pytest.raises(
        SystemExit,
        match=rf"{4 * WEIGHTS} bytes at high .* {2 * WEIGHTS} in bfloat16; start with the --dtype",
    ):
        start(made)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are stored as if the other rank sent zeros."""
    monkeypatch.setattr(attach.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(attach.dist, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(attach.dist, "broadcast", lambda tensor, source, group: None)


def test_where_replicas_stay_nothing_is_allocated_for_moves(
    start: Callable[..., Any], one_rank: None
) -> None:
    still, without = start(placement())
    assert still.mover is None
    assert without.after == 2 * (2 * 2 * WEIGHTS + 3 * (WEIGHTS + 4 * WEIGHTS // 128**2))


def test_where_replicas_may_move_the_expert_on_its_way_counts_as_memory_of_experts(
    start: Callable[..., Any], one_rank: None
) -> None:
    moves, with_room = start(placement(), recalibrate=True)
    assert moves.mover is not None
    low = WEIGHTS + 4 * WEIGHTS // 128**2
    assert moves.mover.num_bytes in range(low, low + 64)
    assert with_room.after == 2 * (2 * 2 * WEIGHTS + 3 * low) + moves.mover.num_bytes
    assert with_room.after <= with_room.before
    assert moves.mover.told()["held"] == [[[-1], [0]]] * 2


def test_moves_without_a_slot_are_refused_by_name(start: Callable[..., Any]) -> None:
    bare = LayerPlacement(low_experts=(1, 4))
    with pytest.raises(SystemExit, match=r"resident\.recalibrate True: the file has no replicas"):
        start(placement((bare, bare)), recalibrate=True)


def test_moves_in_the_decode_role_are_refused_by_name(start: Callable[..., Any]) -> None:
    def decodes(server_args: Any, layers: list[Any]) -> None:
        server_args.disaggregation_mode = "decode"

    with pytest.raises(SystemExit, match=r"resident\.recalibrate True: .* the decode role"):
        start(placement(), spoil=decodes, recalibrate=True)


def test_without_a_file_nothing_is_stored() -> None:
    assert attach_resident(None, Config(), TOPOLOGY, 0, None) == (None, ExpertMemory())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        (b"{", "not JSON"),
        (placement(format="nvfp4").to_json(), "use mxfp4 for 4 bits, or fp8"),
    ],
    ids=["missing", "broken", "4-bit"],
)
def test_a_file_that_is_none_ends_the_start_before_a_weight_is_loaded(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    config = f'{{"resident": {{"placement": "{path}"}}}}'
    args = SimpleNamespace(moelb_config=config, moelb_mode="none", moelb_trace=None,
                           moelb_trace_tokens=None)  # fmt: skip
    with pytest.raises(SystemExit, match=expected):
        take_arguments(args)  # type: ignore[arg-type]
