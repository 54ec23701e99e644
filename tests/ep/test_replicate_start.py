"""Laws of the start of the lever replicate: what is refused, what is held, who goes without."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.low.lanes import HostLanes
from sglang_moelb.ep.memory import MemoryLedger, with_replicas
from sglang_moelb.ep.replicas import attach
from sglang_moelb.ep.replicas import lever as lever_module
from sglang_moelb.ep.replicas import warm_up as warm_up_module
from sglang_moelb.ep.replicas.attach import attach_replicas
from sglang_moelb.ep.replicas.lever import ReplicateLever
from sglang_moelb.ep.replicas.memory import LayerExperts, MappingError
from sglang_moelb.kernels.pull_experts import pull_experts
from sglang_moelb.types import Topology

from .moe_layers import lora, make_layer, offload  # noqa: F401 - fixtures for all tests here

REPLICATE = merge(Config(), {"mode": "replicate"})
AUTO = merge(Config(), {"mode": "auto", "replicate": {"ready": True}})
NUM_OWN, NUM_RANKS = 4, 2
TOPOLOGY = Topology(
    num_layers=3, num_experts=NUM_OWN * NUM_RANKS, num_ranks=NUM_RANKS, topk=2
)
GROUP = SimpleNamespace(cpu_group="gloo")


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that a model is found to have, whose experts are mapped."""
    found = [make_layer(hidden=8, inner=8, num_experts=NUM_OWN) for _ in range(3)]
    monkeypatch.setattr(attach, "expert_layers", lambda model: found)
    monkeypatch.setattr(attach, "map_experts", mapped)
    return found


def mapped(layers: list[Any], *, num_slots: int, rank: int, group: Any) -> list[LayerExperts]:
    assert group == "gloo"
    return [
        LayerExperts(
            w13=torch.zeros(NUM_OWN + num_slots, *one.w13_weight.shape[1:]),
            w2=torch.zeros(NUM_OWN + num_slots, *one.w2_weight.shape[1:]),
            w13_R=(one.w13_weight,) * NUM_RANKS,
            w2_R=(one.w2_weight,) * NUM_RANKS,
        )
        for one in layers
    ]


def runner(**flags: Any) -> Any:
    """SGLang's model runner with its flags."""
    args = {
        "nnodes": 1, "enable_memory_saver": False, "expert_distribution_recorder_mode": None,
    }  # fmt: skip
    return SimpleNamespace(model=None, server_args=SimpleNamespace(**{**args, **flags}))


def attached(config: Config, model_runner: Any = None) -> Any:
    return attach_replicas(model_runner or runner(), config, TOPOLOGY, 0, GROUP)


def quantised(layers: list[Any]) -> None:
    layers[1].quant_method = SimpleNamespace()
    layers[0].quant_method = layers[1].quant_method


def with_lora(layers: list[Any]) -> None:
    from sglang.srt.runtime_context import get_lora

    get_lora().enable_lora = True


def with_runner(layers: list[Any]) -> None:
    layers[0].quant_method.runner.runner_backend = SimpleNamespace(
        value="triton", is_deep_gemm=lambda: False
    )


def with_bias(layers: list[Any]) -> None:
    layers[2].w2_weight_bias = torch.zeros(NUM_OWN, 8)


def with_dispatch(layers: list[Any]) -> None:
    normal = layers[0].dispatcher._inners[0]._normal_dispatcher
    normal.use_fp8, normal.deepep_output_dtype = True, SimpleNamespace(name="FP8")


def in_decode_role(layers: list[Any]) -> None:
    layers[0].dispatcher._inners = [SimpleNamespace()]


def with_offload(layers: list[Any]) -> None:
    from sglang.srt.runtime_context import get_exec

    get_exec().offload.cpu_offload_gb = 4


def with_grouped_offload(layers: list[Any]) -> None:
    from sglang.srt.runtime_context import get_exec

    get_exec().offload.offload_group_size = 2


def as_it_is(layers: list[Any]) -> None:
    """Nothing is wrong with the layers."""


RECORDER = {"expert_distribution_recorder_mode": "stat"}
WRONG = [
    (quantised, {}, ["experts of SimpleNamespace", "serve the bfloat16 checkpoint"]),
    (with_lora, {}, ["--enable-lora", "leave the flag out"]),
    (with_runner, {}, ["--moe-runner-backend triton", "use deep_gemm"]),
    (with_bias, {}, ["experts with a bias"]),
    (with_dispatch, {}, ["dispatch of FP8", "--deepep-dispatcher-output-dtype bf16"]),
    (in_decode_role, {}, ["--deepep-mode low_latency", "use mode none"]),
    (with_offload, {}, ["--cpu-offload-gb", "weights that lie on the host", "leave it out"]),
    (with_grouped_offload, {}, ["--offload-group-size", "leave it out"]),
    (as_it_is, {"nnodes": 2}, ["--nnodes 2", "use one host"]),
    (as_it_is, {"enable_memory_saver": True}, ["--enable-memory-saver", "leave the flag out"]),
    (as_it_is, RECORDER, ["--expert-distribution-recorder-mode stat", "leave the flag out"]),
]


@pytest.mark.parametrize(("spoil", "flags", "expected"), WRONG)
def test_replicate_ends_the_start_by_name_and_auto_goes_on_without_it(
    layers: list[Any],
    caplog: pytest.LogCaptureFixture,
    spoil: Any,
    flags: dict[str, Any],
    expected: list[str],
) -> None:
    spoil(layers)
    with pytest.raises(SystemExit) as ended:
        attached(REPLICATE, runner(**flags))
    assert all(part in str(ended.value) for part in (*expected, "start in another --moelb-mode"))
    with caplog.at_level(logging.WARNING, logger="sglang_moelb"):
        config, lever, num_bytes = attached(AUTO, runner(**flags))
    assert (config.replicate.slots, lever, num_bytes) == (0, None, 0)
    assert config.mode == "auto"
    assert all(part in caplog.text for part in expected)


def test_memory_that_cannot_be_mapped_is_refused_with_the_slots_and_the_reason(
    layers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MappingError("rank 1: no peer access")

    monkeypatch.setattr(attach, "map_experts", refuse)
    with pytest.raises(SystemExit, match=r"replicate\.slots 8 .*rank 1: no peer access"):
        attached(REPLICATE)
    assert attached(AUTO)[1] is None


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "fix"),
    [(8, 125, "use at most 124"), (256, 1, "use more ranks"), (240, 9, "use at most 8")],
)
def test_more_experts_than_deepep_sends_to_are_refused(
    layers: list[Any], num_experts: int, num_slots: int, fix: str
) -> None:
    sizes = Topology(num_layers=3, num_experts=num_experts, num_ranks=2, topk=2)
    config = merge(REPLICATE, {"replicate": {"slots": num_slots}})
    with pytest.raises(SystemExit, match=f"replicate.slots {num_slots} .*{fix}"):
        attach_replicas(runner(), config, sizes, 0, GROUP)


def test_mode_replicate_without_slots_is_refused(layers: list[Any]) -> None:
    with pytest.raises(SystemExit, match=r"replicate\.slots 0 .*use 1 or more"):
        attached(merge(REPLICATE, {"replicate": {"slots": 0}}))


@pytest.mark.parametrize("mode", ["none", "observe", "drop", "downgrade", "auto"])
def test_other_modes_hold_copies_only_where_it_is_asked_for(layers: list[Any], mode: str) -> None:
    plain = merge(Config(), {"mode": mode})
    config, lever, num_bytes = attached(plain)
    assert (config.replicate.slots, lever, num_bytes) == (0, None, 0)
    config, lever, num_bytes = attached(merge(plain, {"replicate": {"ready": True, "slots": 3}}))
    assert config.replicate.slots == 3
    assert lever.told() == {"num_slots": 3, "num_replicated_layers": 0}
    assert num_bytes == 3 * (16 * 8 + 8 * 8) * 4


def test_every_layer_has_pulled_once_by_the_addresses_of_a_pass(
    layers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in layers:
        one.w13_weight, one.w2_weight = one.w13_weight.float(), one.w2_weight.float()
    experts_L = mapped(layers, num_slots=2, rank=1, group="gloo")
    pulled: list[list[int]] = []

    def pull(experts_PR: Any, slots_RS: Any, staged_P: Any, **sizes: Any) -> None:
        pull_experts(experts_PR, slots_RS, staged_P, **sizes)
        tensors = [tensor for of_part in experts_PR for tensor in of_part]
        pulled.append([tensor.data_ptr() for tensor in (*tensors, *staged_P)])

    monkeypatch.setattr(warm_up_module, "pull_experts", pull)
    warm_up_module.pull_in_all_layers(experts_L, TOPOLOGY, 1)
    in_warm_up = pulled.copy()
    monkeypatch.setattr(lever_module, "pull_experts", pull)
    lever = ReplicateLever(layers, experts_L, topology=TOPOLOGY, rank=1, lanes=HostLanes())
    plan = SimpleNamespace(slots_RS=torch.full((NUM_RANKS, 2), -1, dtype=torch.int32))
    for layer in range(len(layers)):
        lever._pull(layer, plan)
    assert in_warm_up == pulled[len(in_warm_up) :]
    assert len(in_warm_up) == len(layers)


def test_the_ledger_tells_of_copies_beside_what_else_is_held() -> None:
    ledger = MemoryLedger(staging_bytes=500, kv_token_bytes=1000)
    with_copies = with_replicas(ledger, 2_000, runner())
    assert with_copies.replicas_bytes == 2_000
    assert with_copies.kv_tokens_lost == 3
    assert with_replicas(ledger, 0, runner()) is ledger
