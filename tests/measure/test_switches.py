"""The mode switched from pass to pass on the host, and what the check of it can see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang.srt.layers.moe.moe_runner.deep_gemm")

from benchmarks.gpu.one_layer import make_layer, received_rows
from sglang_moelb.ep.low.lanes import HostLanes
from sglang_moelb.ep.low.lever import DowngradeLever
from tests.gpu import check_switches
from tests.gpu.check_switches import NUM_LAYERS, SIZES, make_cases, make_lever, run_passes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layers() -> list[Any]:
    return [make_layer(seed, SIZES["cpu"], CPU) for seed in range(NUM_LAYERS)]


@pytest.fixture(scope="module")
def cases(layers: list[Any]) -> Any:
    made = make_cases(CPU, layers)
    check_switches.check_cases(made)
    return made


def test_every_pass_computes_what_its_own_plan_says_however_the_mode_changes(
    layers: list[Any], cases: Any
) -> None:
    outcome = run_passes(make_lever(layers, HostLanes(), CPU), layers, cases, 40)
    assert outcome.num_switches > 20
    assert outcome.num_low_layers > 40
    assert not outcome.wrong_P.any()
    assert list(check_switches.problems(outcome)) == []


def test_the_plan_of_another_pass_is_seen(
    layers: list[Any], cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = DowngradeLever.prepare
    late = [torch.zeros(SIZES["cpu"].num_experts, dtype=torch.int32)]

    def one_late(self: DowngradeLever, layer: int, low_E: torch.Tensor) -> None:
        late.append(low_E)
        prepare(self, layer, late.pop(0))

    monkeypatch.setattr(DowngradeLever, "prepare", one_late)
    outcome = run_passes(make_lever(layers, HostLanes(), CPU), layers, cases, 40)
    assert outcome.wrong_P.any()
    assert "passes with wrong values" in next(check_switches.problems(outcome))


def test_memory_that_grows_and_a_lever_that_never_acts_are_seen() -> None:
    outcome = check_switches.Outcome(wrong_P=torch.zeros(4), num_host_waits=1)
    outcome.samples = [(10, 20, 0), (10, 20, 0), (11, 20, 0), (11, 21, 0)]
    assert [text.split(" from")[0] for text in check_switches.problems(outcome)] == [
        "the host waited 1 times for a plan",
        "no layer ran at low precision",
        "allocated memory grew",
        "reserved memory grew",
    ]


@pytest.mark.parametrize("num_columns", [1, 2])
def test_rows_made_for_a_layer_meet_each_expert_once_and_as_often_as_asked(
    num_columns: int,
) -> None:
    rows = received_rows(0, [0, 130, 1, 7], num_columns, SIZES["cpu"], CPU)
    counts = torch.bincount(rows.topk_ids[rows.topk_ids >= 0], minlength=4)
    assert counts.tolist() == [0, 130, 1, 7]
    assert rows.num_recv_tokens_per_expert == [0, 256, 128, 128]
    first, second = rows.topk_ids.T
    assert not ((first == second) & (first >= 0)).any()
    assert (rows.topk_weights[rows.topk_ids < 0] == 0).all()
