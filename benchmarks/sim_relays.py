"""What relays could save of the transfer of replicas: the busiest link of plans, with and without.

    python benchmarks/sim_relays.py --out rows.jsonl

Without relays every rank pulls a copy from the expert's home, whose link carries it once for each
taker. With them a home sends an expert once and every taker but the last passes it on, so a link
carries at most one expert out for each that its rank holds or takes. Both are bounds: nothing is
lost to hand-overs. Plans are those of `controller.place_replicas` for the routings of
`sim_replicas.py`. Runs on the host, a minute.

Shape letters: R ranks, E experts, S slots.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from replica_routings import RoutingCase, expert_rows
from sim_replicas import KINDS, MIN_ROWS, NUM_SEEDS, NUM_TOKENS

from sglang_moelb.controller.place_replicas import CopyCosts, place_replicas
from sglang_moelb.types import IntArray

SIZES = tuple(product((4, 8, 32, 64), (128, 256)))
NUM_SLOTS = 8
EXPERT_BYTES, LINK_BYTES_PER_US = 9_437_184, 380_000  # of Qwen3-30B-A3B; NVLink, as measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The worst of the seeds: takers of an expert, and microseconds of the busiest link."""

    num_ranks: int
    num_experts: int
    routing: str
    most_takers: int
    direct_us: float
    relayed_us: float


def busiest(slots_RS: IntArray, num_experts: int) -> tuple[int, int, int]:
    """The most takers of an expert, and experts over the busiest link without relays and with."""
    num_ranks = len(slots_RS)
    takers_E = np.bincount(slots_RS[slots_RS >= 0], minlength=num_experts)
    home_E = np.arange(num_experts) // (num_experts // num_ranks)
    in_R = (slots_RS >= 0).sum(axis=1)
    out_R = np.bincount(home_E, takers_E, num_ranks)
    relayed_R = np.bincount(home_E, takers_E > 0, num_ranks)
    for expert in np.flatnonzero(takers_E > 1):
        chain = np.flatnonzero((slots_RS == expert).any(axis=1))
        relayed_R[chain[:-1]] += 1
    direct, relayed = (int(max(sent_R.max(), in_R.max())) for sent_R in (out_R, relayed_R))
    return int(takers_E.max()), direct, relayed


def simulate(case: RoutingCase) -> Row:
    """All seeds of a routing."""
    found = [
        busiest(
            place_replicas(
                expert_rows(case, NUM_TOKENS, seed),
                num_slots=NUM_SLOTS,
                costs=CopyCosts(min_rows=MIN_ROWS),
            ).slots_RS,
            case.num_experts,
        )
        for seed in range(NUM_SEEDS)
    ]
    takers, direct, relayed = (max(one) for one in zip(*found, strict=True))
    copy_us = EXPERT_BYTES / LINK_BYTES_PER_US
    return Row(
        num_ranks=case.num_ranks,
        num_experts=case.num_experts,
        routing=case.name,
        most_takers=takers,
        direct_us=direct * copy_us,
        relayed_us=relayed * copy_us,
    )


def main() -> None:
    """Write a row for each size and routing, and print the worst of each size and kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    args = parser.parse_args()
    rows = []
    for (num_ranks, num_experts), (kind, strength) in product(SIZES, KINDS):
        strength = min(strength, num_ranks) if kind == "rank" else strength
        rows.append(
            simulate(
                RoutingCase(
                    kind=kind, strength=strength, num_ranks=num_ranks, num_experts=num_experts
                )
            )
        )
        print(rows[-1], flush=True)
    args.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
