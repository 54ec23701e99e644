"""Laws of the sweep: the levers that serve, over a probe's routers, and what is told of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.probe.device import Batch, upload
from benchmarks.probe.loader import make_fixed
from benchmarks.probe.model import PLAIN, Probe, draw
from benchmarks.probe.pack import measure, write
from benchmarks.probe.sizes import PRESETS
from benchmarks.probe.sweep import decoding_of, name_of, run, settings
from benchmarks.probe.sweep_report import at_load, full_table
from benchmarks.probe.tasks import make_item
from sglang_moelb.types import Expansion, Level, Lever, Policy, Preference

NUM_RANKS = 4
TASKS = ("copy", "sort")
DROP = Policy(
    epoch=1, lever=Lever.DROP, level=Level.DEVICE, preference=Preference.UNIFORM,
    capacity_factor=0.75, min_batch_tokens=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def probe() -> Probe:
    probe = Probe(PRESETS["tiny"])
    draw(probe, torch.Generator().manual_seed(0))
    return probe


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    made = []
    for arrays in make_fixed(make_item, TASKS, "test", range(6), 150, 1):
        block = np.empty(measure(arrays).num_bytes, dtype=np.uint8)
        made.append(upload(write(arrays, block), block, torch.device("cpu"), PLAIN.attention))
    return made


def test_without_pressure_every_answer_is_the_plain_one(probe: Probe, batches: list[Batch]) -> None:
    policies = [replace(DROP, capacity_factor=32.0), replace(DROP, capacity_factor=0.2)]
    plain, loose, tight = run(probe, batches, PLAIN, NUM_RANKS, policies)
    assert len(batches) > 1
    assert (plain["agreement"], plain["logprob_distance"], plain["num_items"]) == (1.0, 0.0, 12)
    assert loose["agreement"] == 1.0
    assert loose["lost_mass_share"] == 0.0
    assert loose["logprob_distance"] < 1e-5
    assert tight["lost_mass_share"] > 0.5
    assert tight["logprob_distance"] > 1e-2
    low, high = tight["logprob_distance_interval"]
    assert 0 < low < tight["logprob_distance"] < high


def test_no_rank_is_left_with_more_than_its_capacity(probe: Probe, batches: list[Batch]) -> None:
    fill = replace(DROP, lever=Lever.EXPAND, expansion=Expansion.FILL)
    _, dropped, filled = run(probe, batches, PLAIN, NUM_RANKS, [DROP, fill])
    assert 0 < dropped["load_mean"] <= dropped["load_p95"] <= 0.75
    assert dropped["load_mean"] <= filled["load_mean"] <= 0.75
    assert filled["lost_mass_share"] == pytest.approx(dropped["lost_mass_share"], abs=0.01)


def test_answers_are_decoded_and_the_last_token_of_a_prompt_is_not(batches: list[Batch]) -> None:
    for batch in batches:
        decoding_T = decoding_of(batch)
        assert int(decoding_T.sum()) == len(batch.answer_ids_A) - batch.num_items
        spelt = batch.prompts.ids_T[decoding_T].tolist()
        owners = batch.owner_A.tolist()
        last_A = [i + 1 == len(owners) or owners[i + 1] != owners[i] for i in range(len(owners))]
        expected = [int(t) for t, last in zip(batch.answer_ids_A, last_A, strict=True) if not last]
        assert spelt == expected


def test_every_setting_has_its_own_name_level_and_factor() -> None:
    names = [(name_of(p), p.level, p.capacity_factor) for p in settings()]
    assert len(set(names)) == len(names) == 2 * 5 * (4 * 3 + 2 + 2)


def test_the_full_table_has_a_line_with_intervals_for_every_setting() -> None:
    row = {
        "setting": "drop score image_first", "level": "expert", "factor": 0.75, "load_mean": 0.571,
        "load_p95": 0.672, "lost_mass_share": 0.5532, "accuracy": 0.7825,
        "accuracy_interval": [0.7640, 0.8000], "logprob_distance": 0.29513,
        "logprob_distance_interval": [-0.1, 0.31],
    }  # fmt: skip
    rows = [{"accuracy": 1.0}, row, row | {"level": "device", "factor": 2.0}]
    lines = [line for line in full_table(rows).splitlines() if line.startswith("| drop")]
    cells = "0.57 | 0.67 | 55.3 | 78.2 (76.4 to 80.0) | 0.2951 (0.0000 to 0.3100) |"
    assert lines == [
        f"| drop score image-first | 2 | {cells}", f"| drop score image-first | 0.75 | {cells}"
    ]  # fmt: skip
    assert at_load([row, row | {"load_mean": 1.571, "accuracy": 0.8825}], "expert",
                   row["setting"], 1.071, "accuracy") == pytest.approx(0.8325)  # fmt: skip
