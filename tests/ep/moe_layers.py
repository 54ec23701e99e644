"""SGLang's MoE layers and settings, as far as the start of a lever asks them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

unquant = pytest.importorskip("sglang.srt.layers.quantization.unquant")


def make_layer(hidden: int = 128, inner: int = 256, num_experts: int = 4) -> Any:
    """A MoE layer of SGLang's, as far as the start asks it."""
    method = object.__new__(unquant.UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.runner = SimpleNamespace(
        runner_backend=SimpleNamespace(value="deep_gemm", is_deep_gemm=lambda: True),
        config=SimpleNamespace(
            activation="silu", is_gated=True, swiglu_limit=None, gemm1_alpha=None,
            apply_router_weight_on_input=False, no_combine=False,
        ),
    )  # fmt: skip
    normal = SimpleNamespace(
        use_fp8=False, use_mxfp4=False, use_mxfp8=False, use_nvfp4=False,
        deepep_output_dtype=SimpleNamespace(name="BF16"),
    )  # fmt: skip
    return SimpleNamespace(
        w13_weight=torch.zeros(num_experts, 2 * inner, hidden, dtype=torch.bfloat16),
        w2_weight=torch.zeros(num_experts, hidden, inner, dtype=torch.bfloat16),
        quant_method=method,
        dispatcher=SimpleNamespace(_inners=[SimpleNamespace(_normal_dispatcher=normal)]),
        top_k=2,
    )


@pytest.fixture(autouse=True)
def lora(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's adapters: none."""
    given = SimpleNamespace(enable_lora=False, lora_paths=None)
    monkeypatch.setattr("sglang.srt.runtime_context.get_lora", lambda: given)
    return given


@pytest.fixture(autouse=True)
def offload(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's weights on the host: none."""
    given = SimpleNamespace(cpu_offload_gb=0, offload_group_size=-1)
    exec_ = SimpleNamespace(offload=given)
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: exec_)
    return given
