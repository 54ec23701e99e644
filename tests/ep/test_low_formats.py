"""Laws of the choice of a low precision: by device, by name, and refused with the fix."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_moelb.ep.low import attach, formats, mxfp4
from sglang_moelb.ep.low.formats import EMULATED, format_named, format_refusal, resolved
from sglang_moelb.words import FORMATS

from .moe_layers import lora, make_layer, offload  # noqa: F401 - fixtures for all tests here
from .sm100 import blackwell

CPU = torch.device("cpu")
WEIGHT = torch.zeros(2, 128, 128, dtype=torch.bfloat16)


def on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, found: object = object()
) -> None:
    """A device of that capability; `found` is what looking for DeepGEMM gives."""
    monkeypatch.setattr(formats, "capability_of", lambda device: capability)
    monkeypatch.setattr(formats, "find_spec", lambda name: found)
    monkeypatch.setattr(mxfp4, "library_refusal", lambda: None)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "fp8"), ((9, 0), "fp8"), ((10, 0), "mxfp4"), ((10, 3), "mxfp4"), ((12, 0), "")],
)
def test_auto_is_the_best_that_the_lever_runs_on_the_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, expected: str
) -> None:
    on(monkeypatch, capability)
    assert resolved("auto", CPU) == expected
    assert (format_refusal("auto", WEIGHT) is None) == bool(expected)
    if expected:
        assert expected == format_named("auto", [make_layer()]).NAME
    for name in FORMATS[1:]:
        assert resolved(name, CPU) == name


@pytest.mark.parametrize(
    ("name", "capability", "told"),
    [
        ("mxfp4", None, ["mxfp4 on a CPU", "downgrade.format fp8", "mxfp4-emulated"]),
        ("mxfp4", (9, 0), ["capability 9.0", "downgrade.format fp8", "mxfp4-emulated"]),
        ("fp8", (10, 0), ["fp8 on a GPU", "capability 10.0", "downgrade.format mxfp4"]),
        ("fp8", (12, 0), ["capability 12.0", "Hopper (9.0)", "Blackwell (10.x)", "nvfp4-emulated"]),
        ("mxfp4", (12, 1), ["capability 12.1", "Blackwell (10.x)", "nvfp4-emulated"]),
        ("auto", (8, 0), ["capability 8.0", "downgrade.format to nvfp4-emulated"]),
    ],
)
def test_a_format_that_the_device_does_not_run_is_refused_with_what_would_work(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int] | None,
    told: list[str],
) -> None:
    on(monkeypatch, capability)
    refusal = attach.refusal_of(name, [make_layer()])
    assert refusal
    assert all(part in ": ".join(refusal) for part in told), refusal


@pytest.mark.parametrize("name", ["auto", "fp8", "mxfp4"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_without_deepgemm_no_format_is_taken_for_wired(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    on(monkeypatch, capability, found=None)
    refusal = format_refusal(name, WEIGHT)
    assert refusal
    assert "an installed DeepGEMM" in refusal[1]


@pytest.mark.parametrize("name", sorted(EMULATED))
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0), (12, 0)])
def test_emulation_runs_everywhere_on_bfloat16(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int] | None
) -> None:
    on(monkeypatch, capability)
    assert format_refusal(name, WEIGHT) is None
    refusal = format_refusal(name, WEIGHT.float())
    assert (refusal is None) == (capability is None)


def without_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import deep_gemm_wrapper

    monkeypatch.setattr(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", False)


def without_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", ModuleType("deep_gemm"))


def with_quant_info(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    from sglang.srt.layers.moe.moe_runner import deep_gemm

    monkeypatch.setattr(deep_gemm, "DeepGemmMoeQuantInfo", made)


def without_fp4_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    with_quant_info(monkeypatch, dataclasses.make_dataclass("Info", ["w13_weight", "w2_weight"]))


def with_other_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmMoeQuantInfo

    other = type("Info", (DeepGemmMoeQuantInfo,), {"scale_recipes": lambda self, **_: (1, 32)})
    with_quant_info(monkeypatch, other)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_scales, "DEEPGEMM_SCALE_UE8M0"),
        (without_gemm, "m_grouped_fp8_fp4_gemm_nt_contiguous"),
        (without_fp4_experts, "recipes None"),
        (with_other_recipes, "recipes (1, 32)"),
    ],
)
def test_another_sglang_or_deepgemm_than_mxfp4_relies_on_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, told: str
) -> None:
    pytest.importorskip("sglang.srt.layers.moe.moe_runner.runner")
    blackwell(monkeypatch)
    assert format_refusal("mxfp4", WEIGHT) is None
    spoil(monkeypatch)
    for name in ("auto", "mxfp4"):
        refusal = format_refusal(name, WEIGHT)
        assert refusal
        assert told in refusal[0]
        assert "mxfp4-emulated" in refusal[1]
    assert format_refusal("mxfp4-emulated", WEIGHT) is None
