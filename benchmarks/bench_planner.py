"""Time of the plain-Python planner for one layer: 256 experts, 64 ranks, 64 bins.

    python benchmarks/bench_planner.py [--repeats N]

Goal: a median under 5 ms at expert level. Prints median, p10 and p90 over repeats on a seeded,
skewed load (power law over experts, alpha 0.8), after 5 warm-up repeats.

Shape letters: R source ranks, G groups, B bins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np

from sglang_moelb.controller.plan import capacity_rows, plan_cuts
from sglang_moelb.types import IntArray

NUM_EXPERTS, NUM_RANKS, NUM_BINS = 256, 64, 64
TOKENS_PER_RANK, TOPK = 4096, 8
FACTOR, ALPHA, SEED, WARM_UP = 1.25, 0.8, 7, 5


def skewed_load() -> IntArray:
    """Rows by source rank, expert and bin, int32 [R, E, B] as a histogram comes from the device."""
    rng = np.random.default_rng(SEED)
    popularity_E = rng.permutation(np.arange(1, NUM_EXPERTS + 1) ** -ALPHA)
    bins_B = rng.dirichlet(np.full(NUM_BINS, 0.3))
    cells = np.outer(popularity_E / popularity_E.sum(), bins_B).ravel()
    rows_RC = rng.multinomial(TOKENS_PER_RANK * TOPK, cells, size=NUM_RANKS)
    return rows_RC.reshape(NUM_RANKS, NUM_EXPERTS, NUM_BINS).astype(np.int32)


def plan_layer(cuttable_RGB: IntArray) -> int:
    """Capacity and cuts of one layer for rank 0; returns the number of groups that are cut."""
    num_groups = cuttable_RGB.shape[1]
    num_rows = TOKENS_PER_RANK * TOPK * NUM_RANKS
    capacity_G = np.full(num_groups, capacity_rows(FACTOR, num_rows, num_groups), dtype=np.int64)
    cut_bin_G, _ = plan_cuts(cuttable_RGB, np.zeros(num_groups, dtype=np.int64), capacity_G, 0)
    return int((cut_bin_G >= 0).sum())


def times_ms(work: Callable[[], int], num_repeats: int) -> list[float]:
    """Wall time of each repeat in milliseconds, after the warm-up."""
    seen = []
    for _ in range(WARM_UP + num_repeats):
        start = perf_counter()
        work()
        seen.append(1e3 * (perf_counter() - start))
    return seen[WARM_UP:]


def main() -> None:
    """Print one line for expert level and one for device level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    num_repeats = parser.parse_args().repeats
    load_REB = skewed_load()
    load_RRB = load_REB.reshape(NUM_RANKS, NUM_RANKS, -1, NUM_BINS).sum(axis=2, dtype=np.int32)
    for level, cuttable_RGB in (("expert", load_REB), ("device", load_RRB)):
        times = times_ms(lambda cuttable_RGB=cuttable_RGB: plan_layer(cuttable_RGB), num_repeats)
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        print(
            f"planner {level:6} level, {cuttable_RGB.shape[1]} groups, {NUM_RANKS} ranks, "
            f"{NUM_BINS} bins, {plan_layer(cuttable_RGB)} cut: "
            f"median {median:.2f} ms, p10 {p10:.2f}, p90 {p90:.2f} ({num_repeats} repeats)"
        )


if __name__ == "__main__":
    main()
