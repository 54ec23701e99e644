"""A made-up placement for servers of benchmarks: as many bytes as one of real traffic, no traffic.

    python3 -m benchmarks.gpu.make_placement --model DIR --ranks 2 --slots 4 --out placement.json
    python3 -m benchmarks.gpu.make_placement ... --load "2 still experts=8" --format mxfp4

Which experts are hot is drawn at random, or as a load of `skew_plugin` has it; how important each
is, is drawn at random. Sizes are of DIR/config.json.

Shape letters: T tokens, K top-k, L MoE layers, E logical experts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.gpu.skew_plugin import Load, skewed_ids
from sglang_moelb.controller.place_resident import ResidentLimits, place_resident
from sglang_moelb.placement import (
    SCHEMA,
    VERSION,
    ExpertBytes,
    Placement,
    RankMemory,
    Sizes,
    memory_of,
)
from sglang_moelb.stored_formats import LOW_BYTES
from sglang_moelb.types import IntArray


def rows_of(load: Load, sizes: Sizes) -> IntArray:
    """int64 `[L, E]` rows that a load brings to each expert in its first pass."""
    rows = []
    for layer in range(sizes.num_layers):
        rank, first, num_hot = load.hot(layer, 0, sizes.num_ranks, sizes.num_experts)
        ids_TK = skewed_ids(
            load.skew, rank, sizes.num_ranks, sizes.num_experts, sizes.topk, None, first, num_hot
        )
        rows.append(np.bincount(ids_TK.flatten().numpy(), minlength=sizes.num_experts))
    return np.stack(rows)


def made_up(
    model: Path, num_ranks: int, num_slots: int, low_format: str = "fp8", load: Load | None = None
) -> Placement:
    """The placement of a Qwen3 MoE model for a load, or for random hot experts."""
    config = json.loads((model / "config.json").read_text())
    sizes = Sizes(
        num_layers=config["num_hidden_layers"],
        num_experts=config["num_experts"],
        num_ranks=num_ranks,
        topk=config["num_experts_per_tok"],
    )
    num_weights = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    expert_bytes = ExpertBytes(high=2 * num_weights, low=LOW_BYTES[low_format](num_weights))
    drawn = np.random.default_rng(0)
    shape = (sizes.num_layers, sizes.num_experts)
    limits = ResidentLimits(expert_bytes=expert_bytes, num_slots=num_slots)
    rows_LE, importance_LE = drawn.integers(1, 999, shape), drawn.random(shape)
    if load is not None:
        rows_LE, limits = rows_of(load, sizes), replace(limits, aim="ranks")
    layers = place_resident(rows_LE, importance_LE, sizes.topology, limits)
    before, after = memory_of(layers, sizes.topology, expert_bytes)
    return Placement(
        schema=SCHEMA,
        version=VERSION,
        format=low_format,
        sizes=sizes,
        expert_bytes=expert_bytes,
        layers=layers,
        memory=RankMemory(before=before, after=after),
    )


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--load", type=Load.parse, help="place for it, such as '2 still experts=8'")
    parser.add_argument("--format", choices=tuple(LOW_BYTES), default="fp8")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    placement = made_up(args.model, args.ranks, args.slots, args.format, args.load)
    args.out.write_bytes(placement.to_json())


if __name__ == "__main__":
    main()
