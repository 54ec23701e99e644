"""What the doctor says about made-up machines."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from sglang_moelb.doctor.abilities import num_ranks_possible
from sglang_moelb.doctor.facts import Facts, Links, Mark, PatchFact
from sglang_moelb.doctor.judge import judge
from sglang_moelb.doctor.show import table_of
from sglang_moelb.ep.low import formats
from sglang_moelb.types import MODES

from .world import A100, H100, failing, host, laptop, links, plugin, row, seam, with_package

GPU_ABILITIES = {"EP with DeepEP on GPUs", "prefill role", "decode role"}
EPLB = "stock EPLB on Qwen3-VL-MoE, Kimi-VL"


def test_a_laptop_runs_the_demo_and_every_mode_but_no_gpu_server() -> None:
    report = judge(laptop())
    assert report.can_run
    assert failing(report) == GPU_ABILITIES | {EPLB}
    for mode in MODES:
        assert row(report, f"mode {mode}").found.startswith("on CPU")
    assert (
        "same output as stock but for the order of additions" in row(report, "mode replicate").found
    )


def test_without_a_gpu_both_roles_lack_only_what_moves_the_kv_cache() -> None:
    for role in ("prefill role", "decode role"):
        told = row(judge(laptop()), role)
        assert "no GPU" not in told.found
        assert "mooncake-transfer-engine-non-cuda" in told.fix


def test_a_narrow_table_cuts_no_fix() -> None:
    console = Console(width=80, file=StringIO(), record=True)
    console.print(table_of(judge(laptop())))
    assert "…" not in console.export_text()


def test_a_host_of_h100s_runs_everything() -> None:
    report = judge(host(4, patch=PatchFact(state="applied")))
    assert report.can_run
    assert failing(report) == set()
    assert "up to 4 ranks" in row(report, "EP with DeepEP on GPUs").found
    assert row(report, "mode auto").found.startswith("on GPUs and CPU")
    assert row(report, "links").found == "NV18"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (12, 0)])
def test_mode_downgrade_says_what_it_computes_in_on_the_gpus_that_are_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    gpu = replace(H100, capability=capability)
    told = row(judge(host(2, gpus=(gpu, gpu))), "mode downgrade")
    monkeypatch.setattr(formats, "capability_of", lambda device: capability)
    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    chosen = formats.resolved("auto", torch.device("cpu"))
    assert told.mark is Mark.OK
    assert f"lossy; {chosen or 'on these GPUs only with downgrade.format'}" in told.found
    assert ("not yet run" in told.found) == bool(formats.caution(chosen, torch.device("cpu")))
    assert "fp8" not in row(judge(laptop()), "mode downgrade").found


@pytest.mark.parametrize("label", ["DeepEP", "DeepGEMM", "SGLang kernels"])
def test_a_missing_gpu_library_matters_only_where_there_are_gpus(label: str) -> None:
    broken = judge(with_package(host(), label, ""))
    assert {label, *GPU_ABILITIES} <= failing(broken)
    assert row(broken, label).fix == "pip install 'sglang-moelb[gpu]'"
    assert row(judge(laptop()), label).mark is Mark.NOTE


def test_every_row_that_fails_gives_a_fix() -> None:
    broken = [
        with_package(laptop(), "SGLang", "0.5.17"),
        with_package(with_package(laptop(seams=()), "SGLang", ""), "torch", ""),
        laptop(python=(3, 13, 0), missing_extras=("matplotlib",), memory_mib=900),
        laptop(seams=(seam("flags", problem="other parameters", found="f(b)"),)),
        laptop(plugins=(plugin("moelb", allowed=False),), sglang_plugins="other"),
        laptop(patch=PatchFact(state="half-applied"), system="Darwin arm64"),
        host(1),
        host(2, gpus=(A100, A100)),
        with_package(host(), "torch", "2.14.1", "CPU build"),
    ]
    for facts in broken:
        report = judge(facts)
        assert failing(report)
        assert [r.what for r in report.rows if r.mark is Mark.NO and not r.fix] == []


@pytest.mark.parametrize(
    ("facts", "culprit"),
    [
        (with_package(laptop(), "SGLang", "0.5.17"), "SGLang"),
        (with_package(laptop(), "torch", ""), "torch"),
        (laptop(python=(3, 13, 0)), "Python"),
        (laptop(seams=(seam("flags", problem="no such function"),)), "flags"),
        (laptop(plugins=(plugin("moelb", found=False), plugin("moelb_standin"))), "moelb"),
        (laptop(seams=(seam("flags"), seam("http", form="patch"))), "server on CPU"),
    ],
)
def test_nothing_can_run_when_one_needed_thing_is_wrong(facts: Facts, culprit: str) -> None:
    report = judge(facts)
    assert not report.can_run
    assert culprit in failing(report)


def test_the_report_needs_no_extras_for_a_server_but_for_the_demo() -> None:
    report = judge(laptop(missing_extras=("matplotlib",)))
    assert report.can_run
    assert row(report, "server on CPU").mark is Mark.OK
    assert row(report, "demo and A/B on CPU").fix == "pip install 'sglang-moelb[ab]'"


def test_a_plugin_that_sglang_would_leave_out_is_named_with_the_export_that_mends_it() -> None:
    facts = laptop(plugins=(plugin("moelb", allowed=False),), sglang_plugins="other")
    assert row(judge(facts), "moelb").fix == "export SGLANG_PLUGINS=other,moelb"
    facts = laptop(plugins=(plugin("moelb", platform_allows=False),), sglang_platform="xpu")
    assert row(judge(facts), "moelb").fix == "unset SGLANG_PLATFORM"


def test_a_seam_that_does_not_hold_shows_expected_and_found() -> None:
    wrong = seam("dispatch", problem="other parameters", expected="f(a)", found="f(a, b)")
    found = row(judge(laptop(seams=(wrong,))), "dispatch").found
    assert "other parameters" in found
    assert "f(a)" in found
    assert "f(a, b)" in found


def test_the_patch_set_mends_stock_eplb_and_its_failure_says_why() -> None:
    assert row(judge(laptop()), EPLB).fix == "moelb patch apply"
    assert row(judge(laptop(patch=PatchFact(state="applied"))), EPLB).mark is Mark.OK
    unknown = PatchFact(state="unknown", error="no wheel: install the wheel")
    assert "no wheel" in row(judge(laptop(patch=unknown)), "patch set").found


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks"), [(0, 0), (1, 0), (2, 2), (3, 2), (7, 4), (8, 8)]
)
def test_ranks_are_a_size_that_deepep_is_tuned_for(num_gpus: int, num_ranks: int) -> None:
    assert num_ranks_possible(host(num_gpus)) == num_ranks


def test_only_gpus_that_fit_and_reach_each_other_count_as_ranks() -> None:
    assert num_ranks_possible(host(4, gpus=(H100, H100, A100, A100))) == 2
    two_islands = tuple(tuple(a // 2 == b // 2 for b in range(4)) for a in range(4))
    facts = host(4, links=replace(links(4), peer_GG=two_islands))
    assert num_ranks_possible(facts) == 2
    assert "0-2" in row(judge(facts), "links").found
    assert num_ranks_possible(host(4, links=Links())) == 4


def test_a_cpu_build_of_torch_beside_gpus_is_wrong() -> None:
    report = judge(with_package(host(), "torch", "2.14.1+cpu", "CPU build"))
    assert {"torch", "EP with DeepEP on GPUs"} <= failing(report)
