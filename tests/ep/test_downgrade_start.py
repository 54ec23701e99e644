"""Laws of the start of the lever downgrade: what is refused, what is held, and who goes without."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.low import attach
from sglang_moelb.ep.low.attach import attach_downgrade, layers_named, refusal_of
from sglang_moelb.ep.memory import MemoryLedger, kv_token_bytes

from .moe_layers import lora, make_layer, offload  # noqa: F401 - fixtures for all tests here

DOWNGRADE = merge(Config(), {"mode": "downgrade"})
AUTO = merge(Config(), {"mode": "auto", "downgrade": {"ready": True}})


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that a model is found to have."""
    found = [make_layer() for _ in range(3)]
    monkeypatch.setattr(attach, "expert_layers", lambda model: found)
    monkeypatch.setattr(
        attach,
        "_ledger",
        lambda model_runner, staging: MemoryLedger(
            staging_bytes=staging.staging_bytes,
            resident_bytes=staging.resident_bytes,
            kv_token_bytes=1000,
        ),
    )
    return found


RUNNER = SimpleNamespace(model=None)


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


def with_sizes(layers: list[Any]) -> None:
    layers[2] = layers[1] = layers[0] = make_layer(inner=192)


def with_unequal(layers: list[Any]) -> None:
    layers[2] = make_layer(inner=128)


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


WRONG = [
    (quantised, ["experts of SimpleNamespace", "on Hopper fp8 is the lowest", "--quantization"]),
    (with_lora, ["--enable-lora", "leave the flag out"]),
    (with_runner, ["--moe-runner-backend triton", "use deep_gemm"]),
    (with_sizes, ["(4, 384, 128, 128, 192)", "multiples of 128"]),
    (with_unequal, ["equal in all layers"]),
    (with_dispatch, ["dispatch of FP8", "--deepep-dispatcher-output-dtype bf16"]),
    (with_offload, ["--cpu-offload-gb", "weights that lie on the host", "leave it out"]),
    (with_grouped_offload, ["--offload-group-size", "leave it out"]),
    (in_decode_role, ["--deepep-mode low_latency", "acts in prefill only"]),
]


@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_downgrade_ends_the_start_by_name_and_auto_goes_on_without_it(
    layers: list[Any], caplog: pytest.LogCaptureFixture, spoil: Any, expected: list[str]
) -> None:
    spoil(layers)
    with pytest.raises(SystemExit) as ended:
        attach_downgrade(RUNNER, DOWNGRADE, 0, None)
    message = str(ended.value)
    assert message.startswith("sglang_moelb: ")
    assert all(part in message for part in expected), message
    with caplog.at_level(logging.WARNING, logger="sglang_moelb"):
        config, lever, memory = attach_downgrade(RUNNER, AUTO, 0, None)
    assert (config.downgrade.slots, lever, memory) == (0, None, MemoryLedger())
    assert config.mode == "auto"
    assert "mode auto goes without downgrade" in caplog.text
    assert all(part in caplog.text for part in expected)


@pytest.mark.parametrize("mode", ["none", "observe", "drop", "auto"])
def test_other_modes_have_room_only_where_it_is_asked_for(layers: list[Any], mode: str) -> None:
    plain = merge(Config(), {"mode": mode})
    config, lever, _ = attach_downgrade(RUNNER, plain, 0, None)
    assert (config.downgrade.slots, lever) == (0, None)
    config, lever, _ = attach_downgrade(
        RUNNER, merge(plain, {"downgrade": {"ready": True}}), 0, None
    )
    assert config.downgrade.slots == 2
    assert lever is not None


@pytest.mark.parametrize("name", ["fp8", "nvfp4-emulated", "mxfp4-emulated"])
def test_every_format_starts_and_holds_its_own_bytes(layers: list[Any], name: str) -> None:
    config = merge(DOWNGRADE, {"downgrade": {"format": name, "slots": 1}})
    started, lever, memory = attach_downgrade(RUNNER, config, 0, None)
    assert started.downgrade.format == name
    assert lever is not None
    num_weights = 4 * 3 * 256 * 128
    expected = {
        "fp8": num_weights + num_weights // 128**2 * 4,
        "nvfp4-emulated": num_weights // 2 + num_weights // 16 + 2 * 4 * 4,
        "mxfp4-emulated": num_weights // 2 + num_weights // 32,
    }
    assert memory.staging_bytes == expected[name]


@pytest.mark.parametrize(
    ("field", "value"), [("activation", "gelu"), ("is_gated", False), ("swiglu_limit", 7.0)]
)
def test_only_emulation_refuses_experts_that_it_would_compute_wrongly(
    layers: list[Any], field: str, value: object
) -> None:
    setattr(layers[0].quant_method.runner.config, field, value)
    assert refusal_of("fp8", layers) is None
    refusal = refusal_of("nvfp4-emulated", layers)
    assert refusal
    assert field in refusal[0]
    assert "use auto" in refusal[1]


def test_mode_downgrade_without_slots_is_refused(layers: list[Any]) -> None:
    with pytest.raises(SystemExit, match=r"downgrade\.slots 0 .*use 1 or 2"):
        attach_downgrade(RUNNER, merge(DOWNGRADE, {"downgrade": {"slots": 0}}), 0, None)


@pytest.mark.parametrize("mode", ["none", "observe", "drop", "expand"])
def test_other_modes_hold_nothing(layers: list[Any], mode: str) -> None:
    config, lever, memory = attach_downgrade(RUNNER, merge(Config(), {"mode": mode}), 0, None)
    assert lever is None
    assert config.downgrade.slots == 0
    assert memory.kv_tokens_lost == 0


@pytest.mark.parametrize("config", [DOWNGRADE, AUTO], ids=["downgrade", "auto"])
@pytest.mark.parametrize(
    ("resident", "num_slots", "num_kept"),
    [("", 2, 0), ("1", 2, 1), ("0-1", 2, 2), ("0-2", 0, 3), ("all", 0, 3)],
)
def test_copies_and_where_some_layer_has_none_slots_are_held_and_told(
    layers: list[Any], config: Config, resident: str, num_slots: int, num_kept: int
) -> None:
    config = merge(config, {"downgrade": {"resident_layers": resident, "slots": 2}})
    started, lever, memory = attach_downgrade(RUNNER, config, 0, None)
    assert started == config
    assert lever is not None
    assert lever.told() == {"format": "fp8", "num_low_layers": 0, "num_host_waits": 0}
    one = 4 * 3 * 256 * 128
    one += one // 128**2 * 4
    assert (memory.staging_bytes, memory.resident_bytes) == (
        num_slots * one,
        num_kept * one,
    )
    assert memory.kv_tokens_lost == -(-(num_slots + num_kept) * one // 1000)
    assert f"the KV cache has {memory.kv_tokens_lost} tokens less" in memory.line()


@pytest.mark.parametrize(
    ("text", "named"), [("", []), ("all", [0, 1, 2, 3]), ("2", [2]), ("0,2-3", [0, 2, 3])]
)
def test_layers_are_named_one_by_one_or_in_runs(text: str, named: list[int]) -> None:
    assert sorted(layers_named(text, 4)) == named


def test_a_layer_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"resident_layers '2-4' .* MoE layers 0 to 3"):
        layers_named("2-4", 4)


def test_a_token_of_the_kv_cache_is_all_layers_keys_and_values() -> None:
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        hf_text_config=SimpleNamespace(),
        get_num_kv_heads=lambda size: 4 // size,
        head_dim=128,
        v_head_dim=128,
        num_hidden_layers=48,
    )
    assert kv_token_bytes(model, attn_tp_size=1, kv_cache_dtype="auto") == 4 * 256 * 48 * 2
    assert kv_token_bytes(model, attn_tp_size=2, kv_cache_dtype="fp8_e4m3") == 2 * 256 * 48
    model.hf_text_config = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv_token_bytes(model, attn_tp_size=1, kv_cache_dtype="auto") == 576 * 48 * 2
