"""Passes of the benchmark as they were measured on 4 H100, made into records again.

Rows in benchmarks/results say how skewed the load was and what a pass took; a rank's rows follow
from the skew alone (one rank, in turn by layer, has `skew` times the mean and the others share the
rest), and experts' times of the layers from the cost model that was fitted on those runs.

Shape letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from sglang_moelb.replay.cost import Machine
from sglang_moelb.types import Policy, StepRecord, Topology

TOPOLOGY = Topology(num_layers=12, num_experts=128, num_ranks=4, topk=8)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMITS = ("18fd9dd", "c1134c4")
COMPILED = 0.75  # of the median throughput: below it, a kernel was being compiled


@dataclass(frozen=True, kw_only=True)
class Load:
    """One load of the benchmark."""

    commit: str
    label: str
    tokens_per_rank: int
    skew: float
    step_ms: tuple[float, ...]  # of the passes without a lever
    balance_ms: tuple[float, ...]
    bursts: dict[str, list[float]]  # tokens/s by mode, but for those in which a kernel compiled

    @property
    def levers(self) -> list[str]:
        """Modes with a lever, such as drop@1.25."""
        return sorted(mode for mode in self.bursts if "@" in mode)

    def effect(self, mode: str) -> float:
        """Share of the time that `mode` saved, by medians of throughput against no lever.

        0 where fewer than nine in ten pairs of bursts agree on its sign: then it was not resolved.
        """
        base = [rate for name in ("none", "observe") for rate in self.bursts.get(name, [])]
        pairs = [rate > without for rate in self.bursts[mode] for without in base]
        if 0.1 < sum(pairs) / len(pairs) < 0.9:
            return 0.0
        return 1.0 - median(base) / median(self.bursts[mode])


def loads() -> list[Load]:
    """Every load on which a lever was measured against none, at both commits."""
    found = []
    for commit in COMMITS:
        path = RESULTS / f"prefill_h100x4_20261122_{commit}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        groups = defaultdict(list)
        for row in rows:
            # Bursts of 4 requests leave ranks idle: not a load of the benchmark.
            if row["mode"] != "stock" and row["requests"] == 64:
                groups[row["label"], row["tokens"], row["skew"]].append(row)
        for (label, _, skew), here in groups.items():
            without = [r["pass"] for r in here if r["mode"] in ("none", "observe")]
            modes = {row["mode"] for row in here}
            found.append(
                Load(
                    commit=commit,
                    label=label,
                    tokens_per_rank=max(without[0]["num_tokens_R"]),
                    skew=skew,
                    step_ms=tuple(one["step_ms"] for one in without),
                    balance_ms=tuple(one["balance_ms"] for one in without),
                    bursts={
                        mode: _warm([r["tokens_per_s"] for r in here if r["mode"] == mode])
                        for mode in modes
                    },
                )
            )
    return found


def passes(load: Load, num_passes: int, seed: int = 0) -> list[StepRecord]:
    """Records of `load` in mode observe, its measured steps in turn; one in five times its layers.

    The experts of a layer take what the machine's model says, within 2 % (normal, seeded).
    """
    rng = np.random.default_rng(seed)
    machine = Machine()
    made = []
    for step in range(num_passes):
        at = step % len(load.step_ms)
        one = _record(load.tokens_per_rank, load.skew, step, rng)
        mine_L = one.rows_after_LR[:, 0]
        timed = step < 4 or step % 5 == 0
        noise_L = 1.0 + 0.02 * rng.standard_normal(TOPOLOGY.num_layers)
        experts_L = (machine.fixed_ms + machine.ms_per_row * mine_L) * noise_L * timed
        made.append(
            replace(
                one,
                experts_ms_L=experts_L,
                balance_ms=load.balance_ms[at],
                step_ms=load.step_ms[at],
            )
        )
    return made


def _warm(rates: list[float]) -> list[float]:
    return [rate for rate in rates if rate > COMPILED * median(rates)]


def _record(tokens_per_rank: int, skew: float, step: int, rng: np.random.Generator) -> StepRecord:
    num_layers, num_ranks = TOPOLOGY.num_layers, TOPOLOGY.num_ranks
    num_rows = tokens_per_rank * num_ranks * TOPOLOGY.topk
    share_LR = np.full((num_layers, num_ranks), (num_ranks - skew) / (num_ranks - 1) / num_ranks)
    share_LR[np.arange(num_layers), np.arange(num_layers) % num_ranks] = skew / num_ranks
    share_LE = np.repeat(share_LR, TOPOLOGY.experts_per_rank, axis=1) / TOPOLOGY.experts_per_rank
    rows_LE = rng.multinomial(num_rows, share_LE)
    tokens_R = np.full(num_ranks, tokens_per_rank)
    zero_L = np.zeros(num_layers)
    return StepRecord(
        step=step,
        policy=Policy(epoch=0),
        phase="prefill",
        gate_reason="",
        rank=0,
        num_tokens_R=tokens_R,
        num_vision_tokens_R=np.zeros_like(tokens_R),
        num_protected_tokens_R=np.zeros_like(tokens_R),
        num_refused_tokens_R=np.zeros_like(tokens_R),
        rows_LEM=np.stack([rows_LE, np.zeros_like(rows_LE)], axis=-1),
        rows_after_LR=rows_LE.reshape(num_layers, num_ranks, -1).sum(axis=2),
        routed_mass=float(tokens_R.sum() * num_layers),
        lost_mass=0.0,
        moved_mass=0.0,
        num_dropped_rows=0,
        num_added_rows=0,
        experts_ms_L=zero_L,
        layer_ms_L=zero_L,
        balance_ms=0.0,
        step_ms=0.0,
    )
