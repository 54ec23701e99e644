"""Skew of hand-made loads, and of a probe by layer and modality; pictures are pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.probe.figures import draw_experts, draw_training, read_curve
from benchmarks.probe.loader import make_fixed
from benchmarks.probe.model import PLAIN
from benchmarks.probe.skew import compare, rank_skew, summarise, table
from sglang_moelb.ab.theme import LIGHT, render
from tests.probe.train_source import TASKS, make_item
from tests.probe.train_support import TINY, probe_of


def test_skew_of_the_example() -> None:
    assert rank_skew(np.array([3.0, 1.0, 0.0, 0.0]), 2) == 2.0
    assert rank_skew(np.zeros((3, 4)), 2).tolist() == [1.0] * 3


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="8 experts do not divide into 3 ranks"):
        rank_skew(np.ones(8), 3)


def test_each_modality_has_its_own_skew_and_all_has_the_sum() -> None:
    loads = np.zeros((2, 1, 2, 8))
    loads[:, 0, 0, :4] = 1.0  # text on the first half
    loads[:, 0, 1, 4:] = 1.0  # vision on the second
    means = {(r["ep"], r["modality"]): r["mean"] for r in summarise(loads)}
    assert [means[2, kind] for kind in ("text", "vision", "all")] == [2.0, 2.0, 1.0]
    assert means[8, "text"] == 2.0


def test_a_probe_is_compared_with_its_own_start() -> None:
    passes = make_fixed(make_item, TASKS, "test", range(8), 200, 1)
    trained = probe_of()
    with torch.no_grad():  # a router that sends every token the same way
        for layer in trained.model.language_model.layers:
            layer.mlp.gate.weight.zero_()
    result = compare(trained, 1, passes, torch.device("cpu"), PLAIN)
    mean = {
        name: [r["mean"] for r in result[name]["skew"] if r["ep"] == 2 and r["modality"] == "all"]
        for name in ("trained", "untrained")
    }
    assert len(passes) == result["passes"] > 1
    assert mean["trained"] == [2.0] * TINY.num_layers
    assert max(mean["untrained"]) < 1.9
    assert "2.00 (" in table(result)
    shares = np.array(result["untrained"]["expert_share_L2E"])
    assert shares.sum(-1) == pytest.approx(np.ones((TINY.num_layers, 2)), abs=1e-3)


def test_pictures_of_a_curve_and_of_expert_use_are_drawn() -> None:
    row = {"step": 1, "seconds": 3.0, "loss": 2.0, "accuracy": {"sum": 0.5, "count": 0.25}}
    rows = [row | {"kind": "train"}, row | {"kind": "test", "mean_accuracy": 0.4}]
    share = np.full((4, 2, 8), 1 / 8).tolist()
    skew = {name: {"expert_share_L2E": share} for name in ("trained", "untrained")}
    pictures = (
        render(LIGHT, 4.0, lambda figure: draw_training(rows, LIGHT, figure)),
        render(LIGHT, 4.0, lambda figure: draw_experts(skew, LIGHT, figure)),
    )
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000


def test_a_broken_line_of_a_curve_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text('{"kind": "train"}\n{"kin')
    with pytest.raises(ValueError, match=r"curve\.jsonl:2: not JSON"):
        read_curve(path)
    with pytest.raises(ValueError, match="missing; it is written by"):
        read_curve(tmp_path / "none.jsonl")
