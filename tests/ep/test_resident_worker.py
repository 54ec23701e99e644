"""Laws of the controller process where resident replicas follow the load.

Shape letters: L MoE layers, E logical experts, M modalities, R ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_moelb.config import Config, merge
from sglang_moelb.controller import recalibrate
from sglang_moelb.controller.moves import Moved, move_of
from sglang_moelb.controller.place_resident import replicas_for
from sglang_moelb.controller.split import UNITS, split_of
from sglang_moelb.ep import controller_worker
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.controller_messages import RawPass, Setup, encode, to_controller
from sglang_moelb.ep.controller_worker import Worker
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.types import Lever, Policy, StepRecord

from .test_resident_start import TOPOLOGY, placement

HOT = 5  # on rank 1, which holds the only replica, that of expert 0


def told(step: int, moved: Moved, policy: Policy) -> RawPass:
    sizes = Sizes(
        num_tokens=500, num_prefill_tokens=500, phase="prefill",
        move_us=3, move_sum=-7,
    )  # fmt: skip
    message = RawPass(
        slot=0, now_s=float(step), step=step, lever=Lever.NONE, gate_reason="",
        agreed=Agreed(policy=policy, sizes_R=(sizes,) * 2, moved=moved),
        experts_ms_L=[0.0] * 2, layer_ms_L=[0.0] * 2, balance_ms=0.1, step_ms=10.0,
    )  # fmt: skip
    decoded = to_controller(encode(message))
    assert isinstance(decoded, RawPass)
    assert decoded.agreed == message.agreed, "it travels whole"
    return decoded


def record(raw: RawPass, *args: Any) -> StepRecord:
    rows_E = np.full(TOPOLOGY.num_experts, 100)
    rows_E[HOT] = 700
    rows_LEM = np.stack([np.stack([rows_E, np.zeros_like(rows_E)], axis=1)] * 2)
    zeros_R, zeros_L = np.zeros(2, dtype=np.int64), np.zeros(2)
    return StepRecord(
        step=raw.step, policy=raw.agreed.policy, phase="prefill", gate_reason="", rank=0,
        num_tokens_R=zeros_R + 500, num_vision_tokens_R=zeros_R, num_protected_tokens_R=zeros_R,
        num_refused_tokens_R=zeros_R, rows_LEM=rows_LEM,
        rows_after_LR=rows_LEM.sum(axis=2).reshape(2, 2, -1).sum(axis=2),
        routed_mass=1.0, lost_mass=0.0, moved_mass=0.0, num_dropped_rows=0, num_added_rows=0,
        experts_ms_L=zeros_L, layer_ms_L=zeros_L, balance_ms=0.1, step_ms=10.0,
    )  # fmt: skip


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(controller_worker, "build", record)
    path = tmp_path / "p.json"
    path.write_bytes(placement().to_json())
    knobs = {"placement": str(path), "recalibrate": True, "window_passes": 4, "move_ms": 0.7}
    config = merge(Config(), {"resident": knobs})
    setup = Setup(
        parent_id=1, topology=TOPOLOGY, rank=0, config=config, num_slots=1, has_metrics=False,
        trace="",
    )  # fmt: skip
    return Worker(setup, SharedCounts.create(TOPOLOGY))


def test_the_policy_carries_the_move_and_the_split_of_rows_follows_when_it_is_done(
    worker: Worker,
) -> None:
    policy = worker.ready().policy
    assert (policy.move, policy.move_ms) == (0, 0.7)
    moved, splits, reasons, words = Moved(), [], [], []
    for step in range(30):
        answer = worker.read(told(step, moved, policy))
        policy = answer.policy or policy
        if policy.move != moved.word:
            move = move_of(policy.move)
            assert move is not None
            moved = Moved(word=policy.move, held=move.expert)  # done at once
            words.append(move)
        decision = msgspec.msgpack.decode(answer.decision)
        reasons.append(decision["resident"])
        splits.append(msgspec.msgpack.decode(answer.row)["balance_after_L"])
    assert {(move.layer, move.rank, move.expert) for move in words} >= {(0, 0, HOT), (1, 0, HOT)}
    assert reasons[0] == "1 of 4 prefill passes seen"
    assert any(f"expert {HOT} in slot 0 of rank 0" in reason for reason in reasons)
    assert max(splits[-1]) < min(splits[0]), "rows are split as the new placement has them"


def test_by_quota_the_policy_carries_shares_and_goes_back_to_even_when_told(worker: Worker) -> None:
    config = merge(worker._setup.config, {"resident": {"split": "quota", "move_ms": 0}})
    policy = worker.reconfigure(config).policy
    moved, balances = Moved(), []
    for step in range(20):
        answer = worker.read(told(step, moved, policy))
        policy = answer.policy or policy
        moved = Moved(split=policy.split)
        balances.append(msgspec.msgpack.decode(answer.row)["balance_after_L"])
    splits = [split_of(word) for word in policy.split]
    assert splits
    assert all(split is not None and sum(split.shares) == UNITS for split in splits)
    assert "busiest rank" in msgspec.msgpack.decode(answer.decision)["resident"]
    assert max(balances[-1]) != max(balances[0]), "what the status shows follows the shares"
    policy = worker.reconfigure(merge(config, {"resident": {"split": "even"}})).policy
    for step in range(20, 24):
        policy = worker.read(told(step, moved, policy)).policy or policy
        moved = Moved(split=policy.split)
    assert all(not split_of(word).shares for word in policy.split)  # type: ignore[union-attr]


def test_by_quota_a_layer_that_its_shares_balance_never_moves_and_is_not_planned_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []

    def by_shares(raw: RawPass, *args: Any) -> StepRecord:
        whole = record(raw, *args)
        # The copy on rank 1 takes 400 of 700; half of them would leave 850 and 750 on the ranks.
        whole.rows_LEM[:, :, 0] = [700, 300, 100, 100, 100, 100, 100, 100]
        return whole

    def plan(*args: Any) -> Any:
        planned.append(step)
        return replicas_for(*args)

    monkeypatch.setattr(controller_worker, "build", by_shares)
    monkeypatch.setattr(recalibrate, "replicas_for", plan)
    knobs = {"split": "quota", "min_gain": 0.02}
    policy = worker.reconfigure(merge(worker._setup.config, {"resident": knobs})).policy
    for step in range(40):
        moved = Moved(split=policy.split)
        policy = worker.read(told(step, moved, policy)).policy or policy
        assert not policy.move
    assert policy.split
    assert planned, "before its shares were in force"
    assert max(planned) < 10


def test_a_limit_of_0_travels_with_the_policy_at_once(worker: Worker) -> None:
    policy = worker.ready().policy
    for step in range(8):
        policy = worker.read(told(step, Moved(), policy)).policy or policy
    assert policy.move
    config = worker._setup.config
    changed = worker.reconfigure(merge(config, {"resident": {"move_ms": 0}})).policy
    assert (changed.move, changed.move_ms) == (policy.move, 0)
