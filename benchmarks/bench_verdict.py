"""CPU time that the verdict takes of the controller's thread, a second of serving.

    python -m benchmarks.bench_verdict [--seconds 20]

Goal on one core: under 1 ms a second at 100 prefill passes a second. The controller runs in mode
observe with and without the verdict over the same records, interleaved; prints the median of what
each takes and of the differences, once the window of the verdict is full.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import thread_time

import torch

from benchmarks.bench_controller import TOPOLOGIES, World
from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.ep import records
from sglang_moelb.ep.build_record import build
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.types import Observation, Policy, StepRecord, Topology

NUM_RECORDS, NUM_ROUNDS, WARM_UP_PASSES = 256, 5, 2100


def made(topology: Topology) -> list[StepRecord]:
    """Records of passes of changing size and load."""
    world, found = World(topology), []
    shared = SharedCounts.create(topology)
    arrays = shared.counts_SRLW[0], shared.stats_SR8[0], shared.low_SLE[0]
    for step in range(NUM_RECORDS):
        log = world.log(step, Policy(epoch=0))
        counts_RLW = torch.stack([outcome.counts_RW for outcome in log.outcomes_L], dim=1)
        closed = records.close(log, counts_RLW, None, records.slots_of(shared)[0])
        closed.ended.s = 2.0 * sum(
            marks["dispatch"].ms_until(marks["combined"]) / 1e3 for marks in log.marks_L
        )
        found.append(build(records.raw_of(closed, 0.1 * step), *arrays, topology, 0, 1.0))
    return found


def ms_a_second(
    seen: list[StepRecord], topology: Topology, rate: int, num_s: int, *, judged: bool
) -> float:
    """CPU milliseconds of the controller in a second of `rate` passes."""
    config = merge(Config(), {"mode": "observe", "verdict": {"enabled": judged}})
    controller = Controller(config, topology)
    start = 0.0
    for step in range(WARM_UP_PASSES + rate * num_s):
        if step == WARM_UP_PASSES:
            start = thread_time()
        record = seen[step % len(seen)]
        controller.step(Observation(record=record, now_s=step / rate))
    return 1e3 * (thread_time() - start) / num_s


def main() -> None:
    """Print one line for each topology and rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20, help="of serving, a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for topology in TOPOLOGIES:
        seen = made(topology)
        for rate in (100, 8):
            pairs = []
            for turn in range(NUM_ROUNDS):
                order = (False, True) if turn % 2 else (True, False)
                took = {
                    judged: ms_a_second(seen, topology, rate, given.seconds, judged=judged)
                    for judged in order
                }
                pairs.append((took[False], took[True]))
            without, judged_ms = (median(column) for column in zip(*pairs, strict=True))
            more = median(b - a for a, b in pairs)
            print(
                f"{topology.num_layers} layers, {topology.num_ranks} ranks, {rate} passes/s: "
                f"{without:.2f} ms a second without, {judged_ms:.2f} with the verdict, "
                f"{more:.2f} more ({NUM_ROUNDS} rounds)"
            )


if __name__ == "__main__":
    main()
