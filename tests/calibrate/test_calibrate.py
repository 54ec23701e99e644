"""`moelb calibrate` as a whole: the file, its figures, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from sglang_moelb.calibrate.checkpoint import open_checkpoint
from sglang_moelb.calibrate.cli import calibrate
from sglang_moelb.calibrate.importance import write_importance
from sglang_moelb.calibrate.traffic import is_calibrated_on
from sglang_moelb.calibrate.types import CalibrateError
from sglang_moelb.calibrate.wanda import importance_of, read_checkpoint, score, silu_square
from sglang_moelb.placement import LayerPlacement, load
from sglang_moelb.types import Topology

from .world import (
    HIDDEN,
    INNER,
    fused_tensors,
    single_tensors,
    write_checkpoint,
    write_trace,
)

SIZES = {"num_layers": 2, "num_experts": 8, "num_ranks": 2, "topk": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace"))


def run(*args: str | Path) -> Result:
    app = typer.Typer()
    app.command()(calibrate)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_file_holds_a_placement_that_lowers_lis_and_grows_no_memory(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "p.json"
    result = run(trace, "--model", model, "--out", out)
    assert result.exit_code == 0, result.output
    placement = load(out)
    assert json.loads(out.read_bytes())["sizes"] == SIZES
    assert any(layer.replicas for layer in placement.layers)
    assert any(layer.low_experts for layer in placement.layers)
    memory = placement.memory
    weights = 3 * HIDDEN * INNER
    assert memory.before == [2 * 4 * 2 * weights] * 2
    assert all(a <= b for a, b in zip(memory.after, memory.before, strict=True))
    expected, origin = placement.expected, placement.origin
    assert expected is not None
    assert origin is not None
    assert np.mean(expected.after.lis) < np.mean(expected.before.lis)
    assert (origin.num_passes, origin.num_passes_read, expected.num_passes) == (4, 40, 36)
    assert not expected.same_passes
    assert "the other 36" in result.output
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_share_of_one_judges_by_the_same_passes_and_says_so(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    result = run(trace, "--model", model, "--out", tmp_path / "p.json", "--share", "1")
    assert "the same passes: there were no others" in " ".join(result.output.split())
    expected = load(tmp_path / "p.json").expected
    assert expected is not None
    assert (expected.num_passes, expected.same_passes) == (40, True)


def test_another_ep_size_is_planned_for(trace: Path, model: Path, tmp_path: Path) -> None:
    result = run(trace, "--model", model, "--out", tmp_path / "p.json", "--ep", "4")
    assert result.exit_code == 0, result.output
    placement = load(tmp_path / "p.json")
    assert placement.sizes.num_ranks == len(placement.memory.after) == 4


def test_in_4_bits_fewer_experts_pay_for_as_many_replicas(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    found = []
    for name, low in (("fp8", 1 + 4 / 128**2), ("mxfp4", 17 / 32)):
        out = tmp_path / f"{name}.json"
        result = run(trace, "--model", model, "--out", out, "--slots", "1", "--format", name)
        assert result.exit_code == 0, result.output
        placement = load(out)
        assert placement.format == name
        assert f"originals in {name}" in " ".join(result.output.split())
        assert placement.expert_bytes.low == 3 * HIDDEN * INNER * low
        found.append(placement)
    wide, narrow = found
    assert max(narrow.memory.after) <= max(narrow.memory.before)
    assert sum(len(one.replicas) for one in narrow.layers) >= sum(
        len(one.replicas) for one in wide.layers
    )
    assert len(narrow.layers[0].low_experts) <= len(wide.layers[0].low_experts)
    assert max(narrow.memory.after) < max(wide.memory.after) or len(
        narrow.layers[0].low_experts
    ) < len(wide.layers[0].low_experts)


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_formats_without_a_kernel_are_refused_by_name(
    trace: Path, model: Path, tmp_path: Path, name: str
) -> None:
    result = run(trace, "--model", model, "--out", tmp_path / "p.json", "--format", name)
    assert result.exit_code == 2
    assert f"--format {name}: no kernel" in " ".join(result.output.split())


def test_no_slots_and_a_whole_budget_change_nothing(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    run(trace, "--model", model, "--out", tmp_path / "p.json", "--slots", "0")
    placement = load(tmp_path / "p.json")
    assert placement.layers == (LayerPlacement(),) * 2
    assert placement.memory.after == placement.memory.before


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.33, 1.0])
def test_the_passes_to_calibrate_on_are_spread_and_about_the_share(share: float) -> None:
    taken = [number for number in range(1000) if is_calibrated_on(number, share)]
    assert taken[0] == 0
    assert abs(len(taken) - 1000 * share) <= 1
    assert max(np.diff(taken)) <= np.ceil(1 / share)


def test_a_measured_importance_decides_which_experts_go_low(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    values = np.ones((2, 8))
    values[:, [1, 6]] = 0.0
    write_importance(tmp_path / "i.json", values, measure="by hand", model="m")
    args = ("--model", model, "--out", tmp_path / "p.json", "--slots", "0", "--budget", "0.9")
    result = run(trace, *args, "--importance", tmp_path / "i.json")
    assert result.exit_code == 0, result.output
    assert {e for layer in load(tmp_path / "p.json").layers for e in layer.low_experts} == {1, 6}
    assert "Importance: by hand" in result.output


WRONG = [
    (("--share", "0"), ["--share 0", "at most 1 and above 0"]),
    (("--budget", "1.5"), ["--budget 1.5"]),
    (("--aim", "speed"), ["--aim speed", "experts, ranks"]),
    (("--ep", "3"), ["--ep 3", "divide the 8 experts", "2, 4, 8"]),
    (("--budget", "0.3"), ["budget 0.3 cannot be met", "a budget of 0."]),
    (("--keep", "1", "--budget", "0.9"), ["cannot be met", "a budget of 1.000", "keep less high"]),
    (("--importance", "/nowhere"), ["--importance /nowhere", "Give `wanda`"]),
    (("--model", "/nowhere"), ["--model /nowhere", "no *.safetensors"]),
]


@pytest.mark.parametrize(("args", "expected"), WRONG, ids=lambda x: " ".join(x))
def test_what_cannot_be_done_is_said_with_the_fix(
    trace: Path, model: Path, tmp_path: Path, args: tuple[str, ...], expected: list[str]
) -> None:
    result = run(trace, "--model", model, "--out", tmp_path / "p.json", *args)
    assert result.exit_code == 2
    for part in expected:
        assert part in result.output, result.output
    assert not (tmp_path / "p.json").exists()


def test_a_trace_without_passes_is_refused(model: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--model", model, "--out", tmp_path / "p.json")
    assert result.exit_code == 2
    assert "holds no rank-*.trace file" in result.output


def test_the_model_of_another_topology_is_refused(
    trace: Path, model: Path, tmp_path: Path
) -> None:
    other = Topology(num_layers=2, num_experts=4, num_ranks=2, topk=2)
    folder = write_checkpoint(tmp_path / "m", fused_tensors(other))
    result = run(trace, "--model", folder, "--out", tmp_path / "p.json")
    assert result.exit_code == 2
    assert "has 2 MoE layers of 4 experts, the trace 2 of 8" in result.output
    importance = tmp_path / "i.json"
    write_importance(importance, np.ones((2, 4)), measure="x", model="m")
    result = run(trace, "--model", model, "--importance", importance, "--out", tmp_path / "p.json")
    assert "is of (2, 4) layers and experts, the trace of (2, 8)" in result.output


def test_a_quantised_checkpoint_is_refused(trace: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if "experts" in name else tensor
        for name, tensor in fused_tensors().items()
    }
    folder = write_checkpoint(tmp_path / "m", tensors)
    result = run(trace, "--model", folder, "--out", tmp_path / "p.json")
    assert result.exit_code == 2
    assert "F8_E4M3" in result.output
    assert "bfloat16 checkpoint" in result.output


@pytest.mark.parametrize("config", [
    {"num_hidden_layers": 2, "num_nextn_predict_layers": 1},
    {"text_config": {"num_hidden_layers": 2}},
])  # fmt: skip
@pytest.mark.parametrize("stored", [fused_tensors, lambda t: single_tensors(fused_tensors(t))])
def test_layers_of_multi_token_prediction_are_left_out(
    config: dict[str, Any], stored: Callable[[Topology], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with_mtp = Topology(num_layers=3, num_experts=8, num_ranks=2, topk=2)
    folder = write_checkpoint(tmp_path, stored(with_mtp))
    assert open_checkpoint(folder).num_layers == 3, "nothing tells which layers are the model's"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.num_layers, checkpoint.num_experts) == (2, 8)


@pytest.mark.parametrize("name", ["mtp.layers.", "model.mtp.layers."])
@pytest.mark.parametrize("stored", [fused_tensors, lambda: single_tensors(fused_tensors())])
def test_layers_named_mtp_are_none_of_the_models(
    name: str, stored: Callable[[], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """An index as of checkpoints that count layers of multi-token prediction from 0 again."""
    tensors = stored()
    plain = open_checkpoint(write_checkpoint(tmp_path / "plain", tensors))
    folder = write_checkpoint(tmp_path / "mtp", tensors)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2}), encoding="utf-8")
    theirs = {
        re.sub(r".*\blayers\.", name, key): "missing.safetensors"
        for key in tensors
        if ".layers.0." in key
    }
    index = {"weight_map": {**dict.fromkeys(tensors, "model.safetensors"), **theirs}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = open_checkpoint(folder)
    assert (found.num_layers, found.num_experts) == (2, 8)
    for layer, expert in ((0, 0), (1, 7)):
        for one, other in zip(
            found.weights(layer, expert), plain.weights(layer, expert), strict=True
        ):
            assert (one == other).all()


def test_a_broken_config_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CalibrateError, match=r"config\.json cannot be read"):
        open_checkpoint(folder)


def test_both_ways_in_which_experts_are_stored_give_the_same_scores(tmp_path: Path) -> None:
    fused = fused_tensors()
    folders = [
        write_checkpoint(tmp_path / "fused", fused),
        write_checkpoint(tmp_path / "single", single_tensors(fused)),
    ]
    found = [
        read_checkpoint(
            folder, low_format="fp8", score=True, begun=lambda total: None, tick=lambda: None
        )
        for folder in folders
    ]
    np.testing.assert_allclose(found[0].scores_LE, found[1].scores_LE, rtol=1e-6)
    assert found[0].expert_bytes == found[1].expert_bytes
    assert found[0].expert_bytes.low == 3 * 128 * 128 * (1 + 4 / 128**2)


def test_scores_are_weights_times_activations_as_a_run_would_measure_them() -> None:
    drawn = np.random.default_rng(0)
    w13, w2 = drawn.standard_normal((256, 128)) * 0.1, drawn.standard_normal((128, 128))
    norm = drawn.uniform(0.2, 2.0, 128)
    x = drawn.standard_normal((20_000, 128)) * norm
    gate, up = np.split(x @ w13.T, 2, axis=1)
    inner = gate / (1 + np.exp(-gate)) * up

    def wanda(weight: np.ndarray, rows: np.ndarray) -> float:
        return float((np.abs(weight) * np.sqrt((rows**2).mean(axis=0))).sum())

    assert score(w13, w2, norm) == pytest.approx(wanda(w13, x) + wanda(w2, inner), rel=0.02)


def test_silu_of_a_constant_zero_has_no_size() -> None:
    np.testing.assert_allclose(silu_square(np.array([0.0])), [0.0], atol=1e-12)


def test_importance_grows_with_rows_and_layers_are_comparable() -> None:
    values = importance_of(np.array([[1.0, 1.0], [50.0, 50.0]]), np.array([[4, 16], [9, 9]]))
    np.testing.assert_allclose(values, [[2 / 3, 4 / 3], [1, 1]])


def test_a_file_that_cannot_be_written_is_named(trace: Path, model: Path, tmp_path: Path) -> None:
    result = run(trace, "--model", model, "--out", tmp_path)
    assert result.exit_code == 2
    assert "cannot be written" in result.output
