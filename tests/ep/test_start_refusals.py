"""Experts that SGLang computes past the seam of levers end the start, not the first prefill."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.layers.moe.ep_moe.layer")

from sglang_moelb.ep import start


class W4AFp8MoEMethod:
    """Named as SGLang's."""


def layer(**flag: bool) -> Any:
    return SimpleNamespace(quant_method=W4AFp8MoEMethod(), **flag)


def test_experts_past_the_runners_are_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"experts of W4AFp8MoEMethod .*bfloat16 or fp8"):
        start._refuse_unseamed([layer(deprecate_flag=True), layer(deprecate_flag=False)])


def test_experts_of_a_runner_and_of_layers_without_the_flag_are_taken() -> None:
    start._refuse_unseamed([layer(deprecate_flag=True), layer()])


def test_the_flag_is_what_sglang_decides_by() -> None:
    """The attribute that is read here is the one by which SGLang leaves the runner out."""
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE

    source = inspect.getsource(DeepEPMoE.run_moe_core)
    assert "if self.deprecate_flag:" in source
    assert "forward_cutlass_w4afp8" in source
