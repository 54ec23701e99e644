"""CPU time of the controller process for one prefill pass.

    python -m benchmarks.bench_controller [--repeats N] [--mode auto] [--level device] [--slots 8]

Goals on the host clock of one core, with `--slots 0`: `Controller.step` under 0.25 ms at 12 layers,
128 experts, 4 ranks and under 0.4 ms at 48 layers, 8 ranks; at 12 layers `build_record` under
0.2 ms and `Ledger.add` under 0.08 ms. The window holds 32 passes and is full before anything is
measured. Prints median, p10 and p90 of CPU time over repeats; the load is seeded, skewed by a
power law that drifts from pass to pass, and every pass is of another size.

Shape letters: L MoE layers, R ranks, E logical experts, C counts, W counts row width.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from time import thread_time
from typing import TypeVar

import numpy as np
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.ep import records
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.balance import LayerOutcome
from sglang_moelb.ep.build_record import build
from sglang_moelb.ep.clock import HostMark
from sglang_moelb.ep.records import Marks, PassLog
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.ep.status import Ledger
from sglang_moelb.kernels.row_layout import (
    C_CUTTABLE_AMOUNT,
    C_TEXT_ROWS,
    C_VISION_ROWS,
    H_TOKENS,
    MASS_ONE,
    NUM_COUNTS,
    NUM_HEADER,
)
from sglang_moelb.types import Observation, Policy, Topology

TOPOLOGIES = (
    Topology(num_layers=12, num_experts=128, num_ranks=4, topk=8),
    Topology(num_layers=48, num_experts=128, num_ranks=8, topk=8),
)
MIN_TOKENS, MAX_TOKENS, ALPHA, SEED, WARM_UP = 2048, 16384, 0.8, 7, 40
FIXED_MS, MS_PER_ROW, NOISE = 0.2, 2e-5, 0.02
Made = TypeVar("Made")


class World:
    """Makes the logs of passes as the hot path leaves them."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._rng = np.random.default_rng(SEED)
        self._popularity_LE = self._rng.permuted(
            np.tile(np.arange(1, topology.num_experts + 1) ** -ALPHA, (topology.num_layers, 1)),
            axis=1,
        )

    def log(self, step: int, policy: Policy) -> PassLog:
        """A pass under `policy`; its times are those of rows on rank 0 and of the slowest rank."""
        topology, rng = self._topology, self._rng
        num_tokens = int(rng.integers(MIN_TOKENS, MAX_TOKENS))
        sizes = Sizes(num_tokens=num_tokens, num_prefill_tokens=num_tokens, phase="prefill")
        agreed = Agreed(policy=policy, sizes_R=(sizes,) * topology.num_ranks)
        begun = self._mark(0.0)
        log = PassLog(
            step=step, agreed=agreed, lever=policy.lever, gate_reason="", begun=begun, timed=True,
            flags_T=None,
        )  # fmt: skip
        self._popularity_LE *= np.exp(0.05 * rng.standard_normal(self._popularity_LE.shape))
        for layer in range(topology.num_layers):
            outcome, marks = self._layer(layer, num_tokens)
            log.outcomes_L.append(outcome)
            log.marks_L.append(marks)
        return log

    def _layer(self, layer: int, num_tokens: int) -> tuple[LayerOutcome, Marks]:
        topology, rng = self._topology, self._rng
        share_E = self._popularity_LE[layer] / self._popularity_LE[layer].sum()
        rows_RE = rng.multinomial(num_tokens * topology.topk, share_E, size=topology.num_ranks)
        counts_REC = np.zeros((*rows_RE.shape, NUM_COUNTS), dtype=np.int32)
        counts_REC[..., C_TEXT_ROWS] = rows_RE // 2
        counts_REC[..., C_VISION_ROWS] = rows_RE - rows_RE // 2
        counts_REC[..., C_CUTTABLE_AMOUNT] = rows_RE
        header_R8 = np.zeros((topology.num_ranks, NUM_HEADER), dtype=np.int32)
        header_R8[:, H_TOKENS] = num_tokens
        counts_RW = np.concatenate([header_R8, counts_REC.reshape(topology.num_ranks, -1)], axis=1)
        stats_8 = torch.tensor([num_tokens * MASS_ONE, 0, 0, 0, 0, 0, 0, 0])
        outcome = LayerOutcome(
            ids_TC=None,
            weights_TC=None,
            counts_RW=torch.from_numpy(counts_RW),
            stats_8=stats_8,
        )
        mine = int(rows_RE[:, : topology.experts_per_rank].sum())
        took_ms = (FIXED_MS + MS_PER_ROW * mine) * (1.0 + NOISE * rng.standard_normal())
        marks_ms = (0.0, 0.1, 0.2, 0.2 + took_ms, 0.3 + took_ms)
        marks: Marks = {p: self._mark(ms) for p, ms in zip(records.PARTS, marks_ms, strict=True)}
        return outcome, marks

    @staticmethod
    def _mark(ms: float) -> HostMark:
        mark = HostMark()
        mark.s = ms / 1e3
        return mark


def measure(
    topology: Topology, config: Config, num_repeats: int
) -> tuple[dict[str, list[float]], int]:
    """CPU milliseconds of each repeat by what was measured, and passes in which a lever acted."""
    world, controller, ledger = World(topology), Controller(config, topology), Ledger(topology)
    shared = SharedCounts.create(topology)
    slot = records.slots_of(shared)[0]
    arrays = shared.counts_SRLW[0], shared.stats_SR8[0], shared.low_SLE[0], shared.copied_SLR2[0]
    times: dict[str, list[float]] = defaultdict(list)
    num_acted = 0

    def timed(name: str, work: Callable[[], Made]) -> Made:
        start = thread_time()
        made = work()
        times[name].append(1e3 * (thread_time() - start))
        return made

    for step in range(WARM_UP + num_repeats):
        log = world.log(step, controller.policy)
        num_acted += step >= WARM_UP and log.lever != 0
        counts_RLW = torch.stack([outcome.counts_RW for outcome in log.outcomes_L], dim=1)
        stats_R8 = torch.stack([log.outcomes_L[0].stats_8] * topology.num_ranks)
        # Where the lever replicate acts it leaves perfect balance by two copies a rank.
        shared.copied_SLR2[0] = log.agreed.sizes_R[0].num_tokens * topology.topk, 2
        closed = records.close(log, counts_RLW, stats_R8, slot)
        closed.ended.s = 2.0 * sum(
            marks["dispatch"].ms_until(marks["combined"]) / 1e3 for marks in log.marks_L
        )
        told = records.raw_of(closed, 0.1 * step)
        record = timed("build_record", lambda told=told: build(told, *arrays, topology, 0, 1.0))
        seen = Observation(record=record, now_s=told.now_s)
        effects = timed("Controller.step", lambda seen=seen: controller.step(seen))
        timed("Ledger.add", lambda record=record, made=effects: ledger.add(record, made))
    return {name: seen[WARM_UP:] for name, seen in times.items()}, num_acted


def main() -> None:
    """Print one line for each topology and part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--level", default="device")
    parser.add_argument("--slots", type=int, default=8, help="of the lever replicate; 0: without")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tree = {"capacity": {"level": given.level}, "replicate": {"slots": given.slots}}
    config = merge(Config(), {"mode": given.mode, **tree})
    for topology in TOPOLOGIES:
        times, num_acted = measure(topology, config, given.repeats)
        for name, times_ms in times.items():
            p10, median, p90 = np.percentile(times_ms, [10, 50, 90])
            print(
                f"{name:15} {topology.num_layers} layers, {topology.num_experts} experts, "
                f"{topology.num_ranks} ranks: median {median:.3f} ms, p10 {p10:.3f}, "
                f"p90 {p90:.3f} ({given.repeats} repeats, lever in {num_acted} passes)"
            )


if __name__ == "__main__":
    main()
