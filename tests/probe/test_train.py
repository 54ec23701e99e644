"""Training learns, stops and goes on, and its batches depend on their number alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.probe.fit import Settings, rate_share, read_checkpoint
from benchmarks.probe.loader import Maker, Plan, Weights, make_fixed, open_loader
from benchmarks.probe.measure import Tally, answer_loss, mix
from benchmarks.probe.model import PLAIN, Probe
from benchmarks.probe.optim import Masters, orthogonalise
from benchmarks.probe.pack import read
from benchmarks.probe.train import train
from tests.probe.train_source import TASKS, make_item
from tests.probe.train_support import QUESTIONS, batch_of, probe_of


def settings_of(out: Path, **changes: object) -> Settings:
    base: dict[str, object] = {
        "out": out, "size": "tiny", "steps": 4, "batch_tokens": 300, "interval": 2, "num_tests": 1,
        "test_items": 2, "final_items": 2, "num_workers": 2, "ways": PLAIN, "device": "cpu",
    }  # fmt: skip
    return Settings(**(base | changes))  # type: ignore[arg-type]


def plan_of(**changes: object) -> Plan:
    base: dict[str, object] = {
        "source": make_item, "tasks": TASKS, "seed": 5, "batch_tokens": 300, "num_workers": 2,
        "interval": 4,
    }  # fmt: skip
    return Plan(**(base | changes))  # type: ignore[arg-type]


def masters_of(probe: Probe, *, muon: bool) -> Masters:
    masters = [p.detach().clone() for p in probe.parameters()]
    return Masters(probe, masters, weight_decay=0.0, muon=muon)


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("muon", [False, True])
def test_a_few_items_are_learnt_by_heart(muon: bool) -> None:
    probe, batch = probe_of(), batch_of(*QUESTIONS[:2])
    masters = masters_of(probe, muon=muon)
    tally = Tally(2, torch.device("cpu"))
    for _ in range(25):
        logits, _ = probe(batch.prompts)
        loss = answer_loss(logits, batch)
        loss.backward()
        masters.step(1e-2, 1.0)
    tally.add(probe(batch.prompts)[0], batch)
    assert loss < 0.2
    assert tally.read() == ([1, 1], [1, 1])


def test_an_item_with_one_wrong_token_is_wrong() -> None:
    batch = batch_of(*QUESTIONS)
    logits = torch.nn.functional.one_hot(batch.answer_ids_A, 264).float()
    logits[3, :] = 0.0
    tally = Tally(len(QUESTIONS), torch.device("cpu"))
    tally.add(logits, batch)
    assert tally.read() == ([1, 0, 1], [1, 1, 1])
    assert tally.read() == ([0, 0, 0], [0, 0, 0])


def test_every_parameter_has_a_gradient_and_moves() -> None:
    probe, batch = probe_of(), batch_of(*QUESTIONS)
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    logits, _ = probe(batch.prompts)
    answer_loss(logits, batch).backward()
    masters_of(probe, muon=True).step(1e-2, 1.0)
    still = [name for name, p in probe.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_muons_update_is_nearly_orthogonal_for_each_matrix_of_a_stack() -> None:
    stack = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_rate_warms_up_and_ends_low() -> None:
    shares = [rate_share(p) for p in (0.0, 0.01, 0.02, 0.5, 1.0, 1.1)]
    assert shares[1] == pytest.approx(0.5)
    assert shares[2] == pytest.approx(1.0)
    assert shares[3] > shares[4] == pytest.approx(0.01) == shares[5]


def test_tasks_with_low_accuracy_come_more_often() -> None:
    weights = Weights(len(TASKS))
    weights.append([0.1, 0.1, 1.0])
    tasks = Maker(plan_of(batch_tokens=20_000), weights).make(0)["task_S"]
    share = np.bincount(tasks, minlength=3) / len(tasks)
    assert share == pytest.approx([1 / 12, 1 / 12, 10 / 12], abs=0.04)
    assert mix([0.5, 0.5], [3, 0], [4, 0], 0.6) == pytest.approx([0.6, 0.5])


def test_batches_depend_on_their_number_and_seed_and_not_on_the_workers() -> None:
    seen = []
    for num_workers, seed in ((1, 5), (3, 5), (1, 6)):
        weights = Weights(len(TASKS))
        weights.append([1.0] * len(TASKS))
        with open_loader(plan_of(num_workers=num_workers, seed=seed), weights, 2) as loader:
            stream = []
            for _ in range(5):
                with loader.take() as (header, block):
                    stream.append(read(header, block)["ids_T"].tolist())
        seen.append(stream)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert len({str(ids) for ids in seen[0]}) == 5


def test_reused_items_are_shown_as_often_as_asked() -> None:
    weights = Weights(len(TASKS))
    weights.append([1.0] * len(TASKS))
    made = []

    def source(task: str, split: str, index: int) -> object:
        made.append(index)
        return make_item(task, split, index)

    maker = Maker(plan_of(source=source, reuse=4, pool_items=20, batch_tokens=2000), weights)
    maker.make(0)
    fresh = len(made)
    shown = sum(len(maker.make(number)["task_S"]) for number in range(1, 30))
    assert (len(made) - fresh) / shown == pytest.approx(1 / 4, abs=0.06)


def failing(task: str, split: str, index: int) -> object:
    raise ValueError(f"no such font for {task}")


def test_a_failing_task_ends_the_training_with_its_own_message() -> None:
    weights = Weights(len(TASKS))
    weights.append([1.0] * len(TASKS))
    with (
        open_loader(plan_of(source=failing), weights) as loader,
        pytest.raises(RuntimeError, match=r"(?s)worker 0 failed at batch 0.*no such font"),
        loader.take(),
    ):
        pass


def test_fixed_items_hold_every_task_alike() -> None:
    batches = make_fixed(make_item, TASKS, "test", range(7), 400, 2)
    tasks = np.concatenate([arrays["task_S"] for arrays in batches])
    assert len(batches) > 1
    assert np.bincount(tasks).tolist() == [7, 7, 7]


def test_a_training_writes_its_curve_and_a_probe(tmp_path: Path) -> None:
    assert train(settings_of(tmp_path), make_item, TASKS, resume=False)
    kinds = [record["kind"] for record in records(tmp_path)]
    assert kinds == ["train", "test", "train", "final"]
    facts = json.loads((tmp_path / "model" / "probe.json").read_text())
    assert facts["num_steps"] == 4
    assert set(facts["accuracy"]) == set(TASKS)


def test_a_training_of_minutes_ends_at_its_budget_and_is_annealed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, steps=0, minutes=0.05, interval=1)
    assert train(settings, make_item, TASKS, resume=False)
    rows = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert rows[-1]["rate"] == pytest.approx(settings.rate * 0.01, rel=0.01)


def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings_of(whole, steps=8), make_item, TASKS, resume=False)
    assert not train(settings_of(parts, steps=8, pause_after_s=0.0), make_item, TASKS, resume=False)
    assert records(parts)[-1]["step"] < 8
    assert train(settings_of(parts, steps=8, num_workers=1), make_item, TASKS, resume=True)
    loss = [records(out)[-1]["loss"] for out in (whole, parts)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-3)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(settings_of(tmp_path), make_item, TASKS, resume=False)
    other = settings_of(tmp_path, balance=0.5)
    with pytest.raises(ValueError, match=r"trained with balance=0\.001; resume with the same"):
        read_checkpoint(tmp_path / "checkpoint.pt", other)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not readable .*without --resume"):
        read_checkpoint(path, settings_of(tmp_path))
